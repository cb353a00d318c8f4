//! The `process` of the OCI specification: user, groups, capabilities, rlimits, environment, program lookup, seccomp
//! and user namespaces.
use std::fs;
use std::os::unix::fs::{MetadataExt, chown};

use husk_e2e::command::Output;
use husk_e2e::{NAMESPACE, RUNC, case, containerd, spec};
use serde_json::json;

/// Prints the shell's user, groups, capabilities, no_new_privs, seccomp mode and umask from /proc.
const STATUS: &str = "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:|Umask)' /proc/self/status";

#[test]
fn process_has_user_groups_and_umask() {
    case("user", |case| {
        // If the user is given by name, the groups come from the image's /etc/group.
        let output = case.sh("id -u; id -g; id -G; cat ~/mine; touch /etc/x").flags(&["--user", "tester"]).output();
        assert!(output.out().starts_with("1000\n1000\n"), "{}", output.describe());
        assert!(output.out().contains("tester's own"), "{}", output.describe());
        assert!(output.code != 0 && output.err().contains("Permission denied"), "{}", output.describe());
        // Here, the specification gives the user by ids, and lists additional groups and a umask.
        let run = case.with_spec(&format!("{STATUS}; touch /tmp/f; stat -c '%u:%g %a' /tmp/f"), |spec| {
            spec["process"]["user"] =
                json!({ "uid": 1001, "gid": 44, "additionalGids": [44, 29, 2000, 4242], "umask": 0o027 });
        });
        let output = run.output().expect_clean();
        assert_eq!(output.value("Uid"), "1001\t1001\t1001\t1001");
        assert_eq!(output.value("Gid"), "44\t44\t44\t44");
        let mut groups: Vec<u32> = output.value("Groups").split_whitespace().map(|g| g.parse().unwrap()).collect();
        groups.sort_unstable();
        assert_eq!(groups, [29, 44, 2000, 4242]);
        assert_eq!(output.value("Umask"), "0027");
        assert!(output.out().contains("1001:44 640"), "{}", output.describe());
        // The process is not root and has no ambient capabilities. Therefore, execve(2) clears the process's effective
        // capabilities (capabilities(7)).
        assert_eq!(output.value("CapEff"), "0000000000000000");
    });
}

#[test]
fn process_has_the_specified_capabilities_and_no_new_privs() {
    case("caps", |case| {
        // The process gets only CHOWN, NET_BIND_SERVICE and KILL, which are the bits 0, 10 and 5.
        let run = case.with_spec(
            &format!("{STATUS}; chown 1:1 /tmp && echo may chown; hostname x || echo may not"),
            |spec| {
                let set = json!(["CAP_CHOWN", "CAP_NET_BIND_SERVICE", "CAP_KILL"]);
                spec["process"]["capabilities"] = json!({
                    "bounding": set, "effective": ["CAP_CHOWN", "CAP_KILL"], "permitted": set,
                    "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"],
                });
            },
        );
        let output = run.output().expect_code(0);
        assert_eq!(output.value("CapBnd"), "0000000000000421");
        assert_eq!(output.value("CapPrm"), "0000000000000421");
        assert_eq!(output.value("CapInh"), "0000000000000020");
        assert_eq!(output.value("CapAmb"), "0000000000000020");
        assert_eq!(output.value("NoNewPrivs"), "1");
        assert!(output.out().contains("may chown\nmay not"), "{}", output.describe());
        // Here, ctr's flags set the capabilities. An exec has the same capability sets as its container.
        let flags = ["--cap-add", "CAP_SYS_TIME", "--cap-drop", "CAP_MKNOD", "--allow-new-privs"];
        let container = case.container(case.sh("echo up; exec sleep 1000").flags(&flags));
        let output = container.exec("caps", &["sh", "-c", STATUS]).expect_clean();
        let bounding = u64::from_str_radix(&output.value("CapBnd"), 16).unwrap();
        assert_eq!(bounding & (1 << 25), 1 << 25, "CAP_SYS_TIME must be added");
        assert_eq!(bounding & (1 << 27), 0, "CAP_MKNOD must be dropped");
        assert_eq!(output.value("CapEff"), output.value("CapBnd"));
        assert_eq!(output.value("NoNewPrivs"), "0");
        container.kill();
    });
}

#[test]
fn process_has_rlimits_oom_score_env_and_cwd() {
    case("limits", |case| {
        let script =
            "ulimit -n; ulimit -Hn; ulimit -c; ulimit -u; cat /proc/self/oom_score_adj; pwd; echo $A-$B; env | wc -l";
        let run = case.with_spec(script, |spec| {
            spec["process"]["rlimits"] = json!([
                { "type": "RLIMIT_NOFILE", "soft": 345, "hard": 678 },
                { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
                { "type": "RLIMIT_NPROC", "soft": 77, "hard": 77 },
            ]);
            spec["process"]["oomScoreAdj"] = json!(321);
            // A missing working directory is created, as with runc.
            spec["process"]["cwd"] = json!("/srv/made/here");
            spec["process"]["env"] = json!(["PATH=/bin:/usr/bin", "A=with space", "B=x=y", "HOME=/root"]);
        });
        let output = run.output().expect_clean();
        let out = output.out();
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(
            lines[..7],
            ["345", "678", "0", "77", "321", "/srv/made/here", "with space-x=y"],
            "{}",
            output.describe()
        );
    });
}

#[test]
fn program_lookup_uses_container_path() {
    case("path", |case| {
        // The first program is a name, which is looked up in the specification's PATH. The second program is a path
        // relative to the specification's working directory.
        let run = case.with_spec("", |spec| {
            spec["process"]["args"] = json!(["greet"]);
            spec["process"]["env"] = json!(["PATH=/nowhere:/opt/tools:/bin:/usr/bin"]);
        });
        run.output().expect_clean().expect_out("greetings from /opt/tools/greet");
        let run = case.with_spec("", |spec| {
            spec["process"]["args"] = json!(["./greet"]);
            spec["process"]["cwd"] = json!("/opt/tools");
        });
        run.output().expect_clean().expect_out("greetings from ./greet");
    });
}

/// Returns the part of an error that states the cause. This part starts at `exec:`.
fn cause(output: &Output) -> String {
    let err = output.err();
    let start = err.find("exec: ").unwrap_or_else(|| panic!("no cause in the error\n{}", output.describe()));
    err[start..].trim().to_owned()
}

/// Returns the part of an error before the cause. This part names the components that report the error.
fn context(output: &Output) -> String {
    let err = output.err();
    err[..err.find("exec: ").unwrap_or(err.len())].to_owned()
}

#[test]
fn invalid_entry_point_fails_with_same_error_as_runc() {
    let mut outputs = Vec::new();
    for runtime in [RUNC.to_owned(), husk_e2e::runtime()] {
        husk_e2e::case::case_of(&format!("entry{}", outputs.len()), &runtime, |case| {
            let programs = ["/no/such/program", "no-such-program", "/etc/not-executable", "/etc"];
            outputs.push(programs.map(|program| {
                let run = case.busybox(&[program]).keep_container();
                let output = run.output();
                // ctr keeps the container's record if the task could not be created.
                containerd::delete_container(NAMESPACE, run.id()).unwrap();
                output
            }));
        });
    }
    assert_same_errors(&outputs);
}

/// Compares the errors of Husk with those of runc for the same programs.
#[track_caller]
fn assert_same_errors<const N: usize>(outputs: &[[Output; N]]) {
    let [expected, found] = outputs else { panic!("expected the outputs of two runtimes") };
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.code, expected.code, "{}", found.describe());
        assert_eq!(cause(found), cause(expected), "{}", found.describe());
        assert_eq!(context(found), context(expected), "{}", found.describe());
    }
}

#[test]
fn invalid_exec_fails_with_same_error_as_runc() {
    let mut outputs = Vec::new();
    for runtime in [RUNC.to_owned(), husk_e2e::runtime()] {
        husk_e2e::case::case_of(&format!("badexec{}", outputs.len()), &runtime, |case| {
            let container = case.sleeper();
            let programs = ["/no/such/program", "no-such-program", "/etc/not-executable"];
            outputs.push(programs.map(|program| container.exec("bad", &[program])));
            container.exec("good", &["true"]).expect_clean();
            container.kill();
        });
    }
    assert_same_errors(&outputs);
}

#[test]
fn seccomp_profile_filters_init_and_exec() {
    case("seccomp", |case| {
        let run = case.with_spec("echo up; exec sleep 1000", |spec| {
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [
                    { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO" },
                    { "names": ["sethostname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 },
                    // This rule checks an argument: personality is denied only with PER_LINUX32 (8).
                    { "names": ["personality"], "action": "SCMP_ACT_ERRNO", "errnoRet": 7,
                      "args": [{ "index": 0, "value": 8, "op": "SCMP_CMP_EQ" }] },
                ],
            });
            spec::push(spec, "/process/capabilities", "effective", json!("CAP_SYS_ADMIN"));
            spec::push(spec, "/process/capabilities", "permitted", json!("CAP_SYS_ADMIN"));
            spec::push(spec, "/process/capabilities", "bounding", json!("CAP_SYS_ADMIN"));
        });
        let container = case.container(run);
        let mode = container.exec("of-init", &["grep", "^Seccomp:", "/proc/1/status"]).expect_clean();
        assert_eq!(mode.value("Seccomp"), "2", "the container's init must have a seccomp filter");
        let script = "grep ^Seccomp: /proc/self/status; mkdir /tmp/d; hostname x; linux32 true; linux64 echo allowed";
        let output = container.exec("filtered", &["sh", "-c", script]).expect_code(0);
        assert_eq!(output.value("Seccomp"), "2", "the exec must have a seccomp filter");
        let err = output.err();
        assert!(err.contains("'/tmp/d': Operation not permitted"), "mkdir is not denied\n{}", output.describe());
        assert!(
            err.contains("Not supported") || err.contains("not supported"),
            "sethostname is not denied\n{}",
            output.describe()
        );
        assert!(err.contains("rgument list too long"), "personality(PER_LINUX32) is not denied\n{}", output.describe());
        assert!(output.out().contains("allowed"), "personality(PER_LINUX) is denied\n{}", output.describe());
        container.kill();
        // Ordinary programs run with containerd's default profile.
        let output =
            case.sh("grep ^Seccomp: /proc/self/status; unshare -m true || echo refused").flags(&["--seccomp"]).output();
        assert_eq!(output.value("Seccomp"), "2");
        assert!(output.out().contains("refused"), "{}", output.describe());
    });
}

#[test]
fn privileged_container_can_mount_and_write_sysctls() {
    case("privileged", |case| {
        let script = "grep -E '^Cap(Eff|Bnd)' /proc/self/status; mount -t tmpfs t /srv && echo mounted
            echo 1 > /proc/sys/net/ipv4/ip_forward && cat /proc/sys/net/ipv4/ip_forward; test -c /dev/null && echo devices";
        let run = case.sh(script).flags(&["--privileged", "--privileged-without-host-devices"]);
        let output = run.output().expect_clean();
        let effective = u64::from_str_radix(&output.value("CapEff"), 16).unwrap();
        assert_eq!(effective & (1 << 21), 1 << 21, "CAP_SYS_ADMIN must be effective");
        assert!(output.out().ends_with("mounted\n1\ndevices\n"), "{}", output.describe());
    });
}

#[test]
fn id_mappings_apply_to_rootfs_volumes_and_exec() {
    case("userns", |case| {
        // `--uidmap` and `--gidmap` take the first id in the container, the first id on the host and the number of ids.
        let map = "0:200000:65536";
        let volume = case.dir().join("volume");
        fs::create_dir(&volume).unwrap();
        chown(&volume, Some(200_000), Some(200_000)).unwrap();
        fs::write(volume.join("theirs"), "").unwrap();
        let mount = format!("type=bind,src={},dst=/volume,options=rbind:rw", volume.display());
        let script = "cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; id -u; id -g
            stat -c %u:%g / /bin/busybox /etc/passwd | sort -u
            touch /new && chown 5:6 /new && stat -c %u:%g /new
            touch /volume/mine && chown 7:8 /volume/mine && stat -c %u:%g /volume /volume/mine /volume/theirs
            cat /dev/null; ls /root > /dev/null && echo seen; kill -0 1 && echo killed";
        let script = format!("{script}\necho up; exec sleep 1000");
        let run = case.sh(&script).flags(&["--uidmap", map, "--gidmap", map, "--mount", &mount]);
        let container = case.container(run);
        // An exec is in the container's user namespace. Another container of the same image has no user namespace.
        let other = case.sleeper();
        let inside = container.exec("map", &["sh", "-c", "tr -s ' ' < /proc/self/uid_map; stat -c %u /bin/busybox"]);
        assert_eq!(inside.expect_clean().out().trim(), "0 200000 65536\n0");
        let beside = other.exec("map", &["sh", "-c", "tr -s ' ' < /proc/self/uid_map; stat -c %u /bin/busybox"]);
        assert_eq!(beside.expect_clean().out().trim(), "0 0 4294967295\n0");
        other.kill();
        let output = container.kill();
        let lines: Vec<String> = output.out().lines().map(|line| line.trim().to_owned()).collect();
        let seen = fs::metadata(volume.join("mine")).map(|meta| (meta.uid(), meta.gid()));
        let expected = ["0 200000 65536", "0 200000 65536", "0", "0", "0:0", "5:6", "0:0", "7:8", "65534:65534"];
        assert_eq!(lines.get(..expected.len()).unwrap_or(&lines), expected, "{}", output.describe());
        assert_eq!(seen.unwrap(), (200_007, 200_008));
    });
}
