//! The image builders of deploy/kubernetes: the Docker daemon, and unprivileged buildah.
//!
//! Runs: by name only: the image builds take longer than most of the other suites together

use std::fs;
use std::time::{Duration, Instant};

use husk_e2e::cri::manifest::{self, AppliedManifest};
use husk_e2e::cri::pod::{PodContainer, pods};
use husk_e2e::{BUILDAH, DOCKER};

/// Timeout of one build step. An emulated node is slow.
const STEP: Duration = Duration::from_secs(300);

/// Three layers on an empty base: a binary, files that the binary creates, and the removal of one file.
const DOCKERFILE: &str = r#"FROM scratch
ADD busybox /bin/busybox
RUN ["/bin/busybox", "sh", "-c", "busybox mkdir -p /srv/www && echo built > /srv/www/index.html && echo x > /srv/gone"]
RUN ["/bin/busybox", "sh", "-c", "busybox rm /srv/gone && busybox chown 1000:1000 /srv/www"]
CMD ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/srv/www"]
"#;

/// Lists the built image's files, to show that the removed file is gone.
const LIST_FILES: &str = "busybox cat /srv/www/index.html; busybox stat -c %u:%g /srv/www; busybox ls /srv";

/// Runs a script, which has to succeed. Returns the script's stdout.
#[track_caller]
fn step(container: &PodContainer, script: &str) -> String {
    let begun = Instant::now();
    let done = container.exec_within(STEP, &["sh", "-ec", script]);
    println!("{:5.1} s  {script}", begun.elapsed().as_secs_f64());
    assert_eq!(
        done.code,
        0,
        "{script}\nfailed and printed {}{}\nlast 30 lines of the container's log:\n{}",
        done.out,
        done.err,
        last_lines(&container.log())
    );
    done.out.trim_end().to_owned()
}

fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

fn write_context(container: &PodContainer) {
    step(
        container,
        &format!(
            "mkdir /tmp/context; cp /usr/bin/busybox /tmp/context/; cat > /tmp/context/Dockerfile <<'END'\n{DOCKERFILE}END"
        ),
    );
}

#[test]
fn ci_docker_builds_and_runs_on_overlay2() {
    pods("ci-docker", |pods| {
        let manifest = include_str!("../../../deploy/kubernetes/ci-builder.yaml");
        let begun = Instant::now();
        let applied: AppliedManifest = manifest::apply(pods, manifest, &[("docker:dind", DOCKER)]);
        println!("{:5.1} s  pod started", begun.elapsed().as_secs_f64());
        applied.wait_ready(STEP);
        println!("{:5.1} s  dockerd ready", begun.elapsed().as_secs_f64());
        let docker = &applied.containers[0];
        assert_eq!(step(docker, "docker info -f '{{.Driver}} {{.CgroupVersion}}'"), "overlay2 2");
        write_context(docker);
        // DOCKER_BUILDKIT=0 selects the classic builder. Debian's client has no other builder, because BuildKit is a
        // separate package.
        step(docker, "DOCKER_BUILDKIT=0 docker build -q -t app /tmp/context");
        // Docker publishes ports inside the pod. The guest kernel enforces the limits of Docker's containers.
        step(docker, "docker run -d --name web -p 8080:80 app");
        assert_eq!(step(docker, "busybox wget -q -O - http://127.0.0.1:8080/"), "built");
        let peer = format!("{LIST_FILES}; busybox cat /sys/fs/cgroup/memory.max; busybox wget -q -O - http://web/");
        let seen = step(docker, &format!("docker run --rm -m 32m --link web app /bin/busybox sh -c '{peer}'"));
        assert_eq!(seen, "built\n1000:1000\nwww\n33554432\nbuilt");
        assert_eq!(step(docker, "docker exec web /bin/busybox cat /srv/www/index.html"), "built");
        step(docker, "docker rm -f web && docker rmi app");
        // Docker's data is on the node's disk.
        assert!(applied.empty_dir("docker").join("overlay2").is_dir());
    });
}

#[test]
fn ci_buildah_builds_and_runs_unprivileged() {
    pods("ci-buildah", |pods| {
        let manifest = include_str!("../../../deploy/kubernetes/ci-builder-rootless.yaml");
        let applied = manifest::apply(pods, manifest, &[("registry.example/buildah/stable", BUILDAH)]);
        let buildah = &applied.containers[0];
        assert_eq!(step(buildah, "id -u; grep CapEff /proc/self/status"), "1000\nCapEff:\t0000000000000000");
        write_context(buildah);
        step(buildah, "buildah build -t app /tmp/context");
        assert_eq!(step(buildah, "buildah from --name one app"), "one");
        let look = step(buildah, &format!("buildah run one /bin/busybox sh -c '{LIST_FILES}'"));
        assert_eq!(look, "built\n1000:1000\nwww");
        step(buildah, "buildah rm one && buildah rmi app");
        // buildah's data is on the node's disk.
        assert!(fs::read_dir(applied.empty_dir("containers")).unwrap().count() > 0);
    });
}
