//! Pods with a user namespace (`hostUsers: false`): root is mapped to an unprivileged host user, and containers work as
//! in other pods.
//!
//! With runc, these tests pass on containerd 1.7. On containerd 2.x they need runc 1.2 or later, which has id-mapped
//! mounts.
//!
//! Runs: containerd 2

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::time::Duration;

use husk_e2e::cri::userns::{HOST_ID_BASE, SLEEP, check_root_is_mapped, options, pod, sh, with_user_namespace};
use husk_e2e::cri::{expect_error, is_containerd_2, pid_1, pods};
use serde_json::json;

#[test]
fn root_is_mapped_to_an_unprivileged_host_user() {
    pods("userns", check_root_is_mapped);
}

#[test]
fn root_of_a_user_namespace_listens_on_port_80() {
    pods("userns-net", |pods| {
        let pod = pod(pods);
        let script =
            "nc -ll -p 80 -e echo hello & until netstat -ltn | grep -q ':80 '; do sleep 0.1; done; echo up; wait";
        let server = pod.start(&sh(&pod, script));
        server.wait_for("up");
        let address = pod.addresses()[0];
        let mut stream = TcpStream::connect_timeout(&(address, 80).into(), Duration::from_secs(20)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello\n");
        assert_eq!(server.sh("nc -w 20 127.0.0.1 80 < /dev/null"), "hello");
    });
}

#[test]
fn owners_of_volume_files_follow_the_id_mapping() {
    pods("userns-volumes", |pods| {
        // containerd 2.x uses id-mapped mounts. containerd 1.7 copies the image instead and does not map the ids of
        // volumes.
        let maps = is_containerd_2();
        // These volumes are on the node's disk, like the kubelet's volumes.
        let dir = Path::new("/var/lib/kubelet/pods/uid-userns-volumes-1/volumes");
        let data = dir.join("kubernetes.io~empty-dir/data");
        let settings = dir.join("kubernetes.io~configmap/settings");
        for volume in [&data, &settings] {
            fs::create_dir_all(volume).unwrap();
        }
        fs::write(settings.join("key"), "value").unwrap();
        fs::set_permissions(&data, PermissionsExt::from_mode(0o755)).unwrap();
        // With containerd 1.7, the kubelet changes the owners of these volumes' files to host ids of the pod.
        let owner = if maps { 0 } else { HOST_ID_BASE };
        chown(&data, Some(owner), Some(owner)).unwrap();
        chown(settings.join("key"), Some(owner + 3), Some(owner + 4)).unwrap();
        let ids =
            if maps { json!([{ "host_id": HOST_ID_BASE, "container_id": 0, "length": 65536 }]) } else { json!([]) };
        let mount = |host: &Path, inside: &str, readonly: bool| {
            json!({ "host_path": host.to_string_lossy(), "container_path": inside, "readonly": readonly,
                "uidMappings": ids, "gidMappings": ids })
        };
        let pod = pod(pods);
        let mut config = sh(&pod, SLEEP);
        config["mounts"] = json!([mount(&data, "/data", false), mount(&settings, "/settings", true)]);
        let container = pod.start(&config);
        let seen = container.exec(&[
            "sh",
            "-c",
            "stat -c %u:%g /data /settings/key; cat /settings/key; echo; cd /data
             echo mine > file; chown 5:6 file; mkdir -m 0 closed; echo x > closed/x; stat -c %u:%g file closed/x",
        ]);
        let of = |path: &str| fs::metadata(data.join(path)).map(|meta| (meta.uid(), meta.gid()));
        let owners = (of("file"), of("closed/x"));
        pod.stop();
        fs::remove_dir_all(dir.parent().unwrap()).unwrap();
        assert_eq!((seen.out.as_str(), seen.err.as_str()), ("0:0\n3:4\nvalue\n5:6\n0:0\n", ""));
        assert_eq!(owners.0.unwrap(), (owner + 5, owner + 6));
        assert_eq!(owners.1.unwrap(), (owner, owner));
    });
}

#[test]
fn containers_of_a_user_namespace_share_the_pid_namespace() {
    pods("userns-pids", |pods| {
        let mut config = with_user_namespace(pods.config());
        config["linux"]["security_context"]["namespace_options"]["pid"] = json!("POD");
        let pod = pods.run(config);
        let with = |script: &str| {
            let mut config = sh(&pod, script);
            config["linux"]["security_context"]["namespace_options"]["pid"] = json!("POD");
            pod.start(&config)
        };
        let (first, second) = (with(SLEEP), with("exec sleep 54321"));
        assert_eq!(first.sh("readlink /proc/self/ns/pid"), second.sh("readlink /proc/self/ns/pid"));
        // The brackets keep the pattern from matching the command line of this script.
        let find = "grep -l '5432[1]' /proc/[0-9]*/cmdline | cut -d / -f 3";
        assert_eq!(first.sh(&format!("{find} | wc -l")), "1");
        first.sh(&format!("kill -KILL $({find})"));
        assert_eq!(second.wait().0, 137);
        assert_eq!(first.sh("echo still"), "still");
    });
}

/// Only Husk passes this test. Under runc, PID 1 is the pause process.
#[test]
fn husk_confines_pid_1_of_a_shared_pid_namespace() {
    pods("userns-pid-1", |pods| {
        let mut config = with_user_namespace(pods.config());
        config["linux"]["security_context"]["namespace_options"]["pid"] = json!("POD");
        let pod = pods.run(config);
        let mut config = sh(&pod, SLEEP);
        config["linux"]["security_context"]["capabilities"] = json!({ "add_capabilities": ["SYS_PTRACE"] });
        pid_1::check(&pod, config);
    });
}

#[test]
fn tty_seccomp_and_read_only_rootfs_work_in_a_user_namespace() {
    pods("userns-else", |pods| {
        let pod = pod(pods);
        let mut config = sh(&pod, &format!("tty; echo out > /dev/tty; stat -c %u /dev/tty $(tty); {SLEEP}"));
        config["tty"] = json!(true);
        config["linux"]["security_context"]["readonly_rootfs"] = json!(true);
        config["linux"]["security_context"]["no_new_privs"] = json!(true);
        config["linux"]["security_context"]["seccomp"] = json!({ "profile_type": "RuntimeDefault" });
        let container = pod.start(&config);
        container.wait_for("out");
        assert!(container.log().contains("/dev/pts/0"), "{}", container.log());
        assert_eq!(
            container.sh("grep -E 'Seccomp:|NoNewPrivs' /proc/self/status | tr -d '\\t\\n'"),
            "NoNewPrivs:1Seccomp:2"
        );
        let denied = container.exec(&["touch", "/x"]);
        assert!(denied.code != 0 && denied.err.contains("ead-only"), "{denied:?}");
        // The pod's root has no capabilities outside its user namespace.
        let denied =
            container.exec(&["sh", "-c", "mknod /dev/shm/disk b 8 0; mount -t tmpfs x /mnt; date -s 2001-01-01"]);
        assert_eq!(
            denied.err.to_lowercase().matches(": permission denied").count()
                + denied.err.matches("not permitted").count(),
            3,
            "{denied:?}"
        );
    });
}

#[test]
fn container_with_another_id_mapping_than_its_pod_is_rejected() {
    pods("userns-other", |pods| {
        let pod = pod(pods);
        let mut config = sh(&pod, "true");
        config["linux"]["security_context"]["namespace_options"]["userns_options"] = options(HOST_ID_BASE + 65536);
        let container = json!({ "pod_sandbox_id": pod.id, "config": config, "sandbox_config": pod.config });
        let error = expect_error("CreateContainer", &container);
        assert!(error.contains("user namespace config"), "{error}");
        // If the pod has a user namespace, containerd also rejects a container without a user namespace.
        let none = json!({ "pod_sandbox_id": pod.id, "config": pod.sh("true"), "sandbox_config": pod.config });
        let error = expect_error("CreateContainer", &none);
        assert!(error.contains("user namespace config"), "{error}");
    });
}
