//! The rootfs and namespaces of a container: mounts with options and propagation, devices, masked paths, sysctls.
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use husk_e2e::command::Input;
use husk_e2e::{NAMESPACE, case, containerd, spec};
use serde_json::json;

#[test]
fn create_sets_hostname_and_sysctls() {
    case("sysctl", |case| {
        let script = "hostname; cd /proc/sys; cat kernel/shm_rmid_forced net/ipv4/ip_local_port_range \
            net/ipv4/ip_unprivileged_port_start kernel/msgmax";
        let run = case.with_spec(script, |spec| {
            spec["hostname"] = json!("by-spec");
            spec["linux"]["sysctl"] = json!({
                "kernel.shm_rmid_forced": "1",
                "net.ipv4.ip_local_port_range": "20000 30000",
                "net.ipv4.ip_unprivileged_port_start": "0",
                "kernel.msgmax": "12345",
            });
        });
        run.output().expect_clean().expect_out("by-spec\n1\n20000\t30000\n0\n12345");
    });
}

/// Only Husk passes this test. runc sets the domain name since version 1.2, but the node's runc is older.
#[test]
fn husk_sets_domain_name() {
    case("domain", |case| {
        let run = case.with_spec("cat /proc/sys/kernel/domainname", |spec| spec["domainname"] = json!("example.test"));
        run.output().expect_clean().expect_out("example.test");
    });
}

#[test]
fn masked_and_readonly_paths_are_protected() {
    case("masked", |case| {
        fs::write(case.dir().join("secret"), "readable\n").unwrap();
        let script = "cat /etc/passwd; cat /proc/kcore 2>/dev/null | head -c 1; ls -A /opt/tools; echo x > /srv/f
            echo y > /proc/sys/kernel/core_pattern; cat /srv/existing; test -d /no/such || echo absent is no matter";
        let run = case.with_spec(script, |spec| {
            for path in ["/etc/passwd", "/opt/tools", "/no/such"] {
                spec::push(spec, "/linux", "maskedPaths", json!(path));
            }
            spec::push(spec, "/linux", "readonlyPaths", json!("/srv"));
            let root = std::path::PathBuf::from(spec["root"]["path"].as_str().unwrap());
            fs::write(root.join("srv/existing"), "still readable\n").unwrap();
        });
        let output = run.output().expect_code(0);
        assert_eq!(output.out(), "still readable\nabsent is no matter\n", "{}", output.describe());
        assert_eq!(output.err().matches("Read-only file system").count(), 2, "{}", output.describe());
    });
}

#[test]
fn readonly_rootfs_rejects_writes() {
    case("ro-root", |case| {
        let script = "touch /x; touch /etc/passwd; echo fine > /dev/shm/x && cat /dev/shm/x";
        let output = case.sh(script).flags(&["--read-only"]).output().expect_code(0).expect_out("fine");
        assert_eq!(output.err().matches("Read-only file system").count(), 2, "{}", output.describe());
    });
}

#[test]
fn default_mounts_and_devices_exist() {
    case("defaults", |case| {
        let script =
            "for d in null zero full random urandom tty; do test -c /dev/$d && stat -c '%n %t:%T %a' /dev/$d; done
            for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done
            echo x > /dev/null; head -c 4 /dev/zero | od -An -tx1; head -c 9 /dev/urandom | wc -c; echo x > /dev/full
            awk '{print $5}' /proc/self/mountinfo | grep -cE '^(/|/proc|/dev|/dev/pts|/dev/shm|/dev/mqueue|/sys|/run)$'
            cat /proc/1/comm; ls /sys/class/net";
        let output = case.sh(script).output().expect_code(0);
        let expected = "/dev/null 1:3 666\n/dev/zero 1:5 666\n/dev/full 1:7 666\n/dev/random 1:8 666\n\
            /dev/urandom 1:9 666\n/dev/tty 5:0 666\n/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\n\
            pts/ptmx\n 00 00 00 00\n9\n8\nsh\nlo\n";
        assert_eq!(output.out(), expected, "{}", output.describe());
        assert!(
            output.err().contains("No space left on device"),
            "writing to /dev/full did not fail\n{}",
            output.describe()
        );
    });
}

#[test]
fn devices_and_device_rules_of_specification_apply() {
    case("devices", |case| {
        let script = "stat -c '%F %t:%T %a %u:%g' /dev/mine /dev/pipe; head -c 3 /dev/mine | od -An -tx1
            mknod /tmp/kmsg c 1 11 && head -c 1 /tmp/kmsg; mknod /tmp/zero c 1 5; head -c 1 /tmp/zero | od -An -tx1";
        let run = case.with_spec(script, |spec| {
            spec["linux"]["devices"] = json!([
                { "path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 1000, "gid": 44 },
                { "path": "/dev/pipe", "type": "p", "fileMode": 0o600, "uid": 0, "gid": 0 },
            ]);
            spec["linux"]["resources"]["devices"] = json!([
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "c", "access": "m" },
                { "allow": true, "type": "c", "major": 1, "minor": 5, "access": "rw" },
            ]);
        });
        let output = run.output().expect_code(0);
        let out = output.out();
        assert!(
            out.starts_with("character special file 1:5 640 1000:44\nfifo 0:0 600 0:0\n 00 00 00\n 00\n"),
            "{}",
            output.describe()
        );
        // The container can create a device node for a forbidden device, but cannot open it.
        assert!(output.err().contains("/tmp/kmsg: Operation not permitted"), "{}", output.describe());
    });
}

#[test]
fn bind_mounts_have_their_options() {
    case("binds", |case| {
        let dir = case.dir().join("shared");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("from-node"), "node\n").unwrap();
        fs::write(dir.join("tool"), "#!/bin/sh\necho tool ran\n").unwrap();
        fs::set_permissions(dir.join("tool"), fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::chown(dir.join("tool"), Some(1000), Some(44)).unwrap();
        let file = case.dir().join("one-file");
        fs::write(&file, "a single file\n").unwrap();
        let bind = |dst: &str, options: &str| format!("type=bind,src={},dst={dst},options={options}", dir.display());
        let script = "cat /rw/from-node; echo container > /rw/from-container; stat -c '%u:%g %a' /rw/tool
            echo x > /ro/f; cat /ro/from-container; /rw/tool; /noexec/tool; cat /etc/hosts; echo more >> /etc/hosts
            grep -E ' /(ro|rw|noexec) ' /proc/self/mountinfo | awk '{print $5, $6}' | sort";
        let one = format!("type=bind,src={},dst=/etc/hosts,options=rbind:rw", file.display());
        let output = case
            .sh(script)
            .flags(&["--mount", &bind("/rw", "rbind:rw"), "--mount", &bind("/ro", "rbind:ro:nosuid:nodev")])
            .flags(&["--mount", &bind("/noexec", "bind:noexec"), "--mount", &one])
            .output()
            .expect_code(0);
        let out = output.out();
        let expected = "node\n1000:44 755\ncontainer\ntool ran\na single file\n";
        assert!(out.starts_with(expected), "{}", output.describe());
        let options = |point: &str| {
            let line = out.lines().find(|line| line.starts_with(point)).unwrap_or_default();
            line.split(' ').nth(1).unwrap_or_default().split(',').map(str::to_owned).collect::<Vec<_>>()
        };
        for (point, wanted) in
            [("/ro ", ["ro", "nosuid", "nodev"].as_slice()), ("/rw ", &["rw"]), ("/noexec ", &["noexec"])]
        {
            let found = options(point);
            assert!(
                wanted.iter().all(|want| found.iter().any(|f| f == want)),
                "{point}must have the options {wanted:?}, but has {found:?}\n{}",
                output.describe()
            );
        }
        assert!(output.err().contains("Read-only file system"), "{}", output.describe());
        assert!(output.err().contains("/noexec/tool: Permission denied"), "{}", output.describe());
        // The files that the container has written are on the node, and have the owner that the container gave them.
        assert_eq!(fs::read_to_string(dir.join("from-container")).unwrap(), "container\n");
        assert_eq!(fs::metadata(dir.join("from-container")).unwrap().uid(), 0);
        assert_eq!(fs::read_to_string(&file).unwrap(), "a single file\nmore\n");
    });
}

#[test]
fn create_rejects_bind_mount_of_missing_source() {
    case("nobind", |case| {
        let run =
            case.sh("true").flags(&["--mount", "type=bind,src=/no/such/dir,dst=/x,options=rbind"]).keep_container();
        run.output().expect_error(&["/no/such/dir", "no such file or directory"]);
        containerd::delete_container(NAMESPACE, run.id()).unwrap();
    });
}

#[test]
fn tmpfs_mounts_have_their_options() {
    case("tmpfs", |case| {
        let run = case.with_spec(
            "stat -c '%a %u:%g' /scratch; grep ' /scratch ' /proc/self/mountinfo; cp /bin/busybox /scratch/echo
             /scratch/echo no; dd if=/dev/zero of=/scratch/big bs=1M count=20; ls /opt/tools; cat /opt/tools/greet",
            |spec| {
                spec::push(
                    spec,
                    "",
                    "mounts",
                    json!({ "destination": "/scratch", "type": "tmpfs", "source": "tmpfs",
                            "options": ["nosuid", "noexec", "nodev", "size=8m", "mode=1750", "uid=1000", "gid=44"] }),
                );
                // With tmpcopyup, the tmpfs starts with the files that the image has at the mount point.
                spec::push(
                    spec,
                    "",
                    "mounts",
                    json!({ "destination": "/opt/tools", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"] }),
                );
            },
        );
        let output = run.output().expect_code(0);
        let out = output.out();
        assert!(out.starts_with("1750 1000:44\n"), "{}", output.describe());
        for wanted in ["nosuid", "noexec", "nodev", "size=8192k"] {
            assert!(out.contains(wanted), "the tmpfs lacks the option {wanted}\n{}", output.describe());
        }
        assert!(
            out.contains("\ngreet\n") && out.contains("greetings"),
            "tmpcopyup has not copied the image's files\n{}",
            output.describe()
        );
        assert!(output.err().contains("/scratch/echo: Permission denied"), "{}", output.describe());
        assert!(output.err().contains("No space left on device"), "{}", output.describe());
    });
}

#[test]
fn tmpcopyup_copies_content_and_resolves_links_in_rootfs() {
    case("copyup", |case| {
        let script = "cd /srv/tree; stat -c '%n %a %u:%g' . private private/mine tool; readlink out; readlink up
            cat private/mine; echo changed > private/mine; rm tool; grep -o ^tester /srv/away/passwd; ls /srv/away/inner
            ls /srv/volume/sub; stat -c '%n %a' /srv/plain /srv/made; ls /srv/plain; cat /proc/self/mountinfo";
        let volume = case.dir().join("volume");
        fs::create_dir_all(volume.join("sub/of-the-volume")).unwrap();
        let root = std::cell::RefCell::new(std::path::PathBuf::new());
        let run = case.with_spec(script, |spec| {
            let path = std::path::PathBuf::from(spec["root"]["path"].as_str().unwrap());
            let mode = |name: &str, mode: u32| fs::set_permissions(path.join(name), fs::Permissions::from_mode(mode));
            for name in ["srv/tree/private", "srv/volume/sub/of-the-image", "etc/inner", "srv/plain/hidden"] {
                fs::create_dir_all(path.join(name)).unwrap();
            }
            fs::write(path.join("srv/tree/private/mine"), "as it was\n").unwrap();
            fs::write(path.join("srv/tree/tool"), "").unwrap();
            std::os::unix::fs::chown(path.join("srv/tree/private/mine"), Some(1000), Some(44)).unwrap();
            for (name, bits) in [
                ("srv/tree/private/mine", 0o640),
                ("srv/tree/private", 0o711),
                ("srv/tree/tool", 0o4755),
                ("srv/tree", 0o751),
                ("srv/plain", 0o710),
            ] {
                mode(name, bits).unwrap();
            }
            std::os::unix::fs::symlink("/etc/passwd", path.join("srv/tree/out")).unwrap();
            std::os::unix::fs::symlink("../../../../etc", path.join("srv/tree/up")).unwrap();
            // If this link were resolved outside the rootfs, it would lead to a directory of the node or of the guest.
            std::os::unix::fs::symlink("../../../../../../../../etc", path.join("srv/away")).unwrap();
            spec::push(
                spec,
                "",
                "mounts",
                json!({ "destination": "/srv/volume", "type": "bind", "source": volume, "options": ["rbind"] }),
            );
            for (point, options) in [
                ("/srv/tree", json!(["tmpcopyup", "nosuid", "size=4m"])),
                ("/srv/away", json!(["tmpcopyup"])),
                ("/srv/volume/sub", json!(["tmpcopyup"])),
                ("/srv/plain", json!(["size=4m"])),
                ("/srv/made", json!(["tmpcopyup"])),
            ] {
                let mount = json!({ "destination": point, "type": "tmpfs", "source": "tmpfs", "options": options });
                spec::push(spec, "", "mounts", mount);
            }
            *root.borrow_mut() = path;
        });
        let output = run.output().expect_clean();
        let out = output.out();
        let expected = ". 751 0:0\nprivate 711 0:0\nprivate/mine 640 1000:44\ntool 4755 0:0\n/etc/passwd\n\
            ../../../../etc\nas it was\ntester\nof-the-volume\n/srv/plain 710\n/srv/made 1777\n";
        assert!(out.starts_with(expected), "{}", output.describe());
        let tree = out.lines().find(|line| line.contains(" /srv/tree ")).unwrap_or_default();
        assert!(tree.contains("nosuid") && tree.contains("- tmpfs tmpfs") && tree.contains("size=4096k"), "{tree}");
        // The rootfs below the tmpfs mounts has not changed.
        let root = root.borrow();
        assert_eq!(fs::read_to_string(root.join("srv/tree/private/mine")).unwrap(), "as it was\n");
        assert!(root.join("srv/tree/tool").exists());
    });
}

#[test]
fn mounts_have_their_propagation() {
    case("propagation", |case| {
        let script = "for p in / /slave /private; do
            awk -v p=$p '$5 == p {print p, ($7 ~ /master|shared|propagate/) ? $7 : \"private\"}' /proc/self/mountinfo; done";
        let dir = case.dir().join("volume");
        fs::create_dir(&dir).unwrap();
        let run = case.with_spec(script, |spec| {
            spec["linux"]["rootfsPropagation"] = json!("rprivate");
            for (point, how) in [("/slave", "rslave"), ("/private", "rprivate")] {
                let mount = json!({ "destination": point, "type": "bind", "source": dir, "options": ["rbind", how] });
                spec::push(spec, "", "mounts", mount);
            }
        });
        let output = run.output().expect_clean();
        assert!(output.out().contains("/private private"), "{}", output.describe());
        // If the node's root mount is private, the container's root mount cannot be a slave of a peer group. mountinfo
        // then shows no propagation tag for the container's root mount.
        let script = "awk '$5 == \"/\" {print $7}' /proc/self/mountinfo | cut -d: -f1";
        let run = case.with_spec(script, |spec| spec["linux"]["rootfsPropagation"] = json!("rslave"));
        let output = run.output();
        assert!(
            matches!(output.out().trim(), "master" | "-"),
            "unexpected propagation of a rootfs with rslave\n{}",
            output.describe()
        );
    });
}

/// Husk refuses a shared rootfs, because a container's mounts are in the guest and cannot appear on the node.
#[test]
fn husk_rejects_shared_rootfs_propagation() {
    case("shared-root", |case| {
        let run = case.with_spec("true", |spec| spec["linux"]["rootfsPropagation"] = json!("rshared"));
        run.output().expect_error(&["rshared", "rslave"]);
    });
}

#[test]
fn containers_see_only_their_own_processes_and_interfaces() {
    case("namespaces", |case| {
        // The test does not compare the inode numbers of the namespaces, because containers in different VMs may have
        // the same numbers.
        let script = "echo started; exec sleep 1000";
        let mut one = case.sh(script).start(Input::Pipe);
        let mut two = case.sh(script).start(Input::Pipe);
        one.wait_for("started");
        two.wait_for("started");
        // Each container sees one process with the argument 1000, and its own loopback interface.
        let list = husk_e2e::command::run_ctr(&["tasks", "ls", "-q"]).out();
        for id in list.lines() {
            let output = husk_e2e::command::run_ctr(&[
                "tasks",
                "exec",
                "--exec-id",
                "ns",
                id,
                "sh",
                "-c",
                "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n' | grep -c '^1000$'; ls /sys/class/net",
            ]);
            let out = output.out();
            assert!(out.starts_with("1\n") && out.ends_with("lo\n"), "{}", output.describe());
        }
        for id in list.lines() {
            husk_e2e::command::run_ctr(&["tasks", "kill", "-s", "KILL", id]).expect_code(0);
        }
        one.wait().expect_code(137);
        two.wait().expect_code(137);
    });
}
