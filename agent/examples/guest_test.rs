//! Drives an agent over vsock loopback from inside its own guest and prints what it finds: `guest_test ROOTFS`.
//!
//! Boot a guest whose `/init` starts this in the background and then becomes `husk-agent`; the root file system needs
//! a busybox in `/bin`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use husk_proto::agent::{CreateOptions, EventsRequest, Interface, Neighbour, Route, SetupRequest, event};
use husk_proto::agent_ttrpc::SandboxClient;
use husk_proto::containerd::api::*;
use husk_proto::containerd::cgroups_v2::metrics::Metrics;
use husk_proto::containerd::shim_async::TaskClient;
use husk_proto::{CREATE_OPTIONS_URL, ports, stream::Header};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::{Value, json};
use ttrpc::context::{self, Context};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

static TOKEN: AtomicU64 = AtomicU64::new(1);
static NAME: AtomicU64 = AtomicU64::new(1);

fn main() {
    let rootfs = std::env::args().nth(1).unwrap_or_else(|| "/rootfs".into());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(all(rootfs))) {
        Ok(()) => println!("guest_test: done"),
        Err(error) => println!("guest_test: FAILED {error}"),
    }
}

fn ctx() -> Context {
    context::with_timeout(120_000_000_000)
}

struct Driver {
    task: TaskClient,
    rootfs: String,
}

async fn all(rootfs: String) -> Outcome {
    let started = Instant::now();
    let client = loop {
        match ttrpc::asynchronous::Client::connect("vsock://1:1024").await {
            Ok(client) => break client,
            Err(_) if started.elapsed() < Duration::from_secs(20) => {
                tokio::time::sleep(Duration::from_millis(50)).await
            }
            Err(error) => return Err(error.into()),
        }
    };
    println!("connected after {:?}", started.elapsed());
    std::thread::spawn(|| {
        let _ = dial(ports::LOG).map(|mut log| std::io::copy(&mut log, &mut std::io::stdout()));
    });
    let sandbox = SandboxClient::new(client.clone());
    let mut events = sandbox.events(ctx(), &EventsRequest::new()).await?;
    tokio::spawn(async move {
        while let Ok(Some(event)) = events.recv().await {
            match event.kind {
                Some(event::Kind::Exit(e)) => {
                    println!(
                        "event: exit {} {:?} pid {} status {} oom {}",
                        e.container_id, e.exec_id, e.pid, e.status, e.oom
                    )
                }
                Some(event::Kind::Oom(e)) => println!("event: oom {}", e.container_id),
                _ => {}
            }
        }
    });
    let mut setup = SetupRequest { hostname: "pod".into(), entropy: vec![7; 32], ..Default::default() };
    // With a network device in the guest (QEMU's user network), the pod gets it.
    let device = std::fs::read_to_string("/sys/class/net/eth0/address");
    if let Ok(mac) = &device {
        let (name, mac) = ("pod0".to_owned(), mac.trim().to_owned());
        let addresses = vec!["10.0.2.15/24".into(), "fd00::15/64".into()];
        let route = |destination: &str, gateway: &str| {
            let (destination, gateway) = (destination.to_owned(), gateway.to_owned());
            Route { destination, gateway, interface: "pod0".into(), metric: 50, mtu: 1300, ..Default::default() }
        };
        let neighbour = Neighbour {
            address: "10.0.2.99".into(),
            mac: "02:00:00:00:00:99".into(),
            interface: "pod0".into(),
            ..Default::default()
        };
        setup.interfaces = vec![Interface { name, mac, mtu: 1400, addresses, ..Default::default() }];
        setup.routes = vec![
            route("10.0.2.0/24", ""),
            route("fd00::/64", ""),
            route("", "10.0.2.2"),
            route("10.9.0.0/16", ""),
            route("fd01::/64", "fd00::1"),
        ];
        setup.neighbours = vec![neighbour];
        setup.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "0".into());
    }
    let answer = timed("setup", sandbox.setup(ctx(), &setup)).await?;
    println!("kernel {} agent {}", answer.kernel_release, answer.agent_version);
    let driver = Driver { task: TaskClient::new(client), rootfs };
    if device.is_ok() {
        let script =
            "ip a; ip r; ip -6 r; ip n; ping -c 1 -W 5 10.0.2.2; cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
        println!("{}", driver.sh(script).await?.out);
    }
    let mut failed = 0;
    macro_rules! check {
        ($($name:ident),*) => {$(
            let started = Instant::now();
            match driver.$name().await {
                Ok(()) => println!("ok   {} ({:?})", stringify!($name), started.elapsed()),
                Err(error) => { failed += 1; println!("FAIL {}: {error}", stringify!($name)) }
            }
        )*};
    }
    check!(
        prints,
        code,
        missing,
        missing_path,
        not_executable,
        stdin,
        output,
        terminal,
        exec,
        exec_missing,
        exec_terminal,
        limits,
        oom,
        pause,
        pids_and_stats,
        kill,
        user,
        devices,
        readonly,
        many,
        eight_execs,
        seccomp_exec,
        stdout_reopened,
        shared_pids,
        no_process_left
    );
    println!("guest_test: {failed} failed");
    Ok(())
}

async fn timed<T, E>(what: &str, future: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let started = Instant::now();
    let result = future.await;
    println!("time {what}: {:?}", started.elapsed());
    result
}

fn dial(port: u32) -> std::io::Result<File> {
    // SAFETY: plain socket calls on data that lives through them.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as u16;
        address.svm_port = port;
        address.svm_cid = 1;
        let length = size_of::<libc::sockaddr_vm>() as u32;
        if fd < 0 || libc::connect(fd, (&raw const address).cast(), length) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(File::from_raw_fd(fd))
    }
}

fn stream() -> Outcome<(String, File)> {
    let token = TOKEN.fetch_add(1, Ordering::Relaxed);
    let mut file = dial(ports::STREAM)?;
    file.write_all(&Header { token }.encode())?;
    Ok((token.to_string(), file))
}

fn reader(mut file: File) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let _ = file.read_to_end(&mut all);
        all
    })
}

fn half_close(file: &File) {
    use std::os::fd::AsRawFd;
    // SAFETY: a live socket.
    unsafe { libc::shutdown(file.as_raw_fd(), libc::SHUT_WR) };
}

fn ensure(good: bool, what: impl Into<String>) -> Outcome {
    if good { Ok(()) } else { Err(what.into().into()) }
}

fn process(args: &[&str]) -> Value {
    let caps = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_MKNOD", "CAP_SETGID", "CAP_SETUID", "CAP_KILL"];
    json!({"user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/",
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "A=b"], "noNewPrivileges": true,
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "capabilities": {"bounding": caps, "effective": caps, "permitted": caps}})
}

fn spec(args: &[&str]) -> Value {
    json!({"ociVersion": "1.1.0", "process": process(args), "root": {"path": "rootfs"}, "hostname": "box",
      "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}],
      "linux": {"resources": {"devices": [{"allow": false, "access": "rwm"}]},
        "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}, {"type": "cgroup"}],
        "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]}})
}

struct Ran {
    status: u32,
    out: String,
}

impl Driver {
    fn name(&self) -> String {
        format!("c{}", NAME.fetch_add(1, Ordering::Relaxed))
    }

    async fn create(&self, id: &str, spec: &Value, io: (&str, &str, &str), terminal: bool) -> ttrpc::Result<u32> {
        let options =
            CreateOptions { spec: spec.to_string().into_bytes(), rootfs: self.rootfs.clone(), ..Default::default() };
        let value = options.write_to_bytes().unwrap_or_default();
        let request = CreateTaskRequest {
            id: id.into(),
            bundle: "/b".into(),
            terminal,
            stdin: io.0.into(),
            stdout: io.1.into(),
            stderr: io.2.into(),
            options: MessageField::some(Any { type_url: CREATE_OPTIONS_URL.into(), value, ..Default::default() }),
            ..Default::default()
        };
        Ok(self.task.create(ctx(), &request).await?.pid)
    }

    async fn start(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        Ok(self.task.start(ctx(), &request).await?.pid)
    }

    async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        Ok(self.task.wait(ctx(), &request).await?.exit_status)
    }

    async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        Ok(self.task.delete(ctx(), &request).await?.exit_status)
    }

    async fn kill_it(&self, id: &str, signal: u32, all: bool) -> ttrpc::Result<()> {
        self.task.kill(ctx(), &KillRequest { id: id.into(), signal, all, ..Default::default() }).await.map(|_| ())
    }

    async fn run(&self, spec: &Value) -> Outcome<Ran> {
        let id = self.name();
        let (token, file) = stream()?;
        let out = reader(file);
        timed("create", self.create(&id, spec, ("", &token, &token.replace(&token, "")), false)).await?;
        timed("start", self.start(&id, "")).await?;
        let status = timed("wait", self.wait(&id, "")).await?;
        let out = String::from_utf8_lossy(&out.join().unwrap_or_default()).into_owned();
        timed("delete", self.delete(&id, "")).await?;
        Ok(Ran { status, out })
    }

    async fn sh(&self, script: &str) -> Outcome<Ran> {
        self.run(&spec(&["sh", "-c", script])).await
    }

    async fn sleeper(&self) -> Outcome<String> {
        let id = self.name();
        self.create(&id, &spec(&["sleep", "1000"]), ("", "", ""), false).await?;
        self.start(&id, "").await?;
        Ok(id)
    }

    async fn end(&self, id: &str) -> Outcome {
        self.kill_it(id, 9, true).await?;
        self.wait(id, "").await?;
        self.delete(id, "").await?;
        Ok(())
    }

    async fn exec_in(&self, id: &str, exec_id: &str, process: &Value) -> Outcome<Ran> {
        let (token, file) = stream()?;
        let out = reader(file);
        let value = process.to_string().into_bytes();
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            stdout: token,
            spec: MessageField::some(Any { value, ..Default::default() }),
            ..Default::default()
        };
        self.task.exec(ctx(), &request).await?;
        timed("exec start", self.start(id, exec_id)).await?;
        let status = self.wait(id, exec_id).await?;
        let out = String::from_utf8_lossy(&out.join().unwrap_or_default()).into_owned();
        self.delete(id, exec_id).await?;
        Ok(Ran { status, out })
    }

    async fn prints(&self) -> Outcome {
        let ran =
            self.sh("echo hello; hostname; pwd; echo $A $HOME; id; ls /proc/self/fd | wc -l; cat /proc/1/comm").await?;
        println!("{}", ran.out);
        ensure(ran.status == 0 && ran.out.starts_with("hello\nbox\n/\nb /root\n"), ran.out)
    }

    async fn code(&self) -> Outcome {
        let ran = self.sh("exit 3").await?;
        ensure(ran.status == 3, format!("{}", ran.status))
    }

    async fn fails(&self, args: &[&str], want: &str) -> Outcome {
        let id = self.name();
        match self.create(&id, &spec(args), ("", "", ""), false).await {
            Ok(_) => Err("created".into()),
            Err(error) => {
                let left = std::path::Path::new("/proc/1/root/sys/fs/cgroup/husk").join(&id).exists();
                ensure(error.to_string().contains(want) && !left, format!("{error} left {left}"))
            }
        }
    }

    async fn missing(&self) -> Outcome {
        self.fails(&["nosuch"], "error during container init: exec: \\\"nosuch\\\": executable file not found in $PATH")
            .await
    }

    async fn missing_path(&self) -> Outcome {
        self.fails(&["/no/such"], "exec: \\\"/no/such\\\": stat /no/such: no such file or directory").await
    }

    async fn not_executable(&self) -> Outcome {
        self.fails(&["/etc/passwd"], "exec: \\\"/etc/passwd\\\": permission denied").await
    }

    async fn stdin(&self) -> Outcome {
        let id = self.name();
        let ((itoken, mut input), (otoken, file)) = (stream()?, stream()?);
        let out = reader(file);
        self.create(&id, &spec(&["sh", "-c", "cat | wc -c; sleep 0"]), (&itoken, &otoken, ""), false).await?;
        self.start(&id, "").await?;
        let writing = std::thread::spawn(move || {
            let chunk = vec![b'x'; 1 << 20];
            for _ in 0..64 {
                input.write_all(&chunk)?;
            }
            half_close(&input);
            // The stream stays open until the container has ended.
            input.read(&mut [0]).map(|_| ())
        });
        let status = timed("64 MiB in", self.wait(&id, "")).await?;
        let out = out.join().unwrap_or_default();
        self.delete(&id, "").await?;
        drop(writing);
        ensure(status == 0 && out == b"67108864\n", format!("{status} {}", String::from_utf8_lossy(&out)))
    }

    async fn output(&self) -> Outcome {
        let ran = timed("64 MiB out", self.sh("dd if=/dev/zero bs=1M count=64 2>/dev/null")).await?;
        ensure(ran.out.len() == 64 << 20, format!("{}", ran.out.len()))
    }

    async fn terminal(&self) -> Outcome {
        let id = self.name();
        let (token, mut file) = stream()?;
        let out = reader(file.try_clone()?);
        let script = "tty; read x; stty size; echo got $x; test -t 1 && echo terminal";
        self.create(&id, &spec(&["sh", "-c", script]), (&token, &token, ""), true).await?;
        self.start(&id, "").await?;
        self.task
            .resize_pty(ctx(), &ResizePtyRequest { id: id.clone(), width: 100, height: 40, ..Default::default() })
            .await?;
        file.write_all(b"word\n")?;
        let status = self.wait(&id, "").await?;
        let text = String::from_utf8_lossy(&out.join().unwrap_or_default()).into_owned();
        self.delete(&id, "").await?;
        ensure(status == 0 && text.contains("40 100") && text.contains("got word") && text.contains("terminal"), text)
    }

    async fn exec(&self) -> Outcome {
        let id = self.sleeper().await?;
        let ran = self
            .exec_in(&id, "e1", &process(&["sh", "-c", "echo $A $HOME; hostname; ps; cat /proc/self/cgroup; exit 5"]))
            .await?;
        println!("{}", ran.out);
        self.end(&id).await?;
        ensure(ran.status == 5 && ran.out.starts_with("b /root\nbox\n"), ran.out)
    }

    async fn exec_missing(&self) -> Outcome {
        let id = self.sleeper().await?;
        let failed = self.exec_in(&id, "e1", &process(&["nosuch"])).await;
        let deleted = self.delete(&id, "e1").await;
        self.end(&id).await?;
        let text = failed.err().map(|e| e.to_string()).unwrap_or_default();
        let want =
            "exec failed: unable to start container process: exec: \\\"nosuch\\\": executable file not found in $PATH";
        ensure(text.contains(want) && deleted.is_ok(), text)
    }

    async fn exec_terminal(&self) -> Outcome {
        let id = self.sleeper().await?;
        let (token, file) = stream()?;
        let out = reader(file);
        let mut process = process(&["sh", "-c", "stty size; tty; id -u; ls -ln $(tty)"]);
        process["consoleSize"] = json!({"height": 33, "width": 77});
        process["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 6]});
        let request = ExecProcessRequest {
            id: id.clone(),
            exec_id: "t".into(),
            terminal: true,
            stdin: token.clone(),
            stdout: token,
            spec: MessageField::some(Any { value: process.to_string().into_bytes(), ..Default::default() }),
            ..Default::default()
        };
        self.task.exec(ctx(), &request).await?;
        self.start(&id, "t").await?;
        let status = self.wait(&id, "t").await?;
        let text = String::from_utf8_lossy(&out.join().unwrap_or_default()).into_owned();
        self.end(&id).await?;
        ensure(status == 0 && text.contains("33 77") && text.contains("1000"), text)
    }

    async fn limits(&self) -> Outcome {
        let mut spec = spec(&[
            "sh",
            "-c",
            "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max; ulimit -n; sleep 1000",
        ]);
        spec["linux"]["resources"] = json!({"memory": {"limit": 67108864}, "cpu": {"quota": 50000, "period": 100000, "shares": 512, "cpus": "0-63"}, "pids": {"limit": 77}});
        let id = self.name();
        let (token, mut file) = stream()?;
        self.create(&id, &spec, ("", &token, ""), false).await?;
        self.start(&id, "").await?;
        let mut text = [0; 30];
        file.read_exact(&mut text)?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let value =
            json!({"memory": {"limit": 33554432}, "cpu": {"quota": 20000, "period": 100000}}).to_string().into_bytes();
        let request = UpdateTaskRequest {
            id: id.clone(),
            resources: MessageField::some(Any { value, ..Default::default() }),
            ..Default::default()
        };
        let updated = self.task.update(ctx(), &request).await;
        let ran =
            self.exec_in(&id, "e", &process(&["cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max"])).await?;
        self.end(&id).await?;
        updated?;
        ensure(
            text == "67108864\n50000 100000\n77\n1024\n" && ran.out == "33554432\n20000 100000\n",
            format!("{text:?} {:?}", ran.out),
        )
    }

    async fn oom(&self) -> Outcome {
        let mut spec = spec(&["sh", "-c", "x=$(dd if=/dev/zero bs=1M count=200 | tr '\\0' x); echo survived"]);
        spec["linux"]["resources"] = json!({"memory": {"limit": 20971520, "swap": 20971520}});
        let ran = self.run(&spec).await?;
        ensure(ran.status != 0, format!("{} {}", ran.status, ran.out))
    }

    async fn pause(&self) -> Outcome {
        let id = self.sleeper().await?;
        self.task.pause(ctx(), &PauseRequest { id: id.clone(), ..Default::default() }).await?;
        let state = self.task.state(ctx(), &StateRequest { id: id.clone(), ..Default::default() }).await?;
        let refused = self.exec_in(&id, "p", &process(&["true"])).await.is_err();
        self.task.resume(ctx(), &ResumeRequest { id: id.clone(), ..Default::default() }).await?;
        let after = self.task.state(ctx(), &StateRequest { id: id.clone(), ..Default::default() }).await?;
        self.end(&id).await?;
        ensure(state.status() == Status::PAUSED && after.status() == Status::RUNNING && refused, format!("{state:?}"))
    }

    async fn pids_and_stats(&self) -> Outcome {
        let id = self.name();
        self.create(&id, &spec(&["sh", "-c", "sleep 999 & sleep 999 & wait"]), ("", "", ""), false).await?;
        self.start(&id, "").await?;
        let started = Instant::now();
        let mut count = 0;
        while count != 3 && started.elapsed() < Duration::from_secs(10) {
            count = self.task.pids(ctx(), &PidsRequest { id: id.clone(), ..Default::default() }).await?.processes.len();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let stats = self.task.stats(ctx(), &StatsRequest { id: id.clone(), ..Default::default() }).await?.stats;
        let metrics = Metrics::parse_from_bytes(&stats.value)?;
        self.end(&id).await?;
        println!(
            "memory {} cpu {} pids {} hugetlb {}",
            metrics.memory.usage,
            metrics.cpu.usage_usec,
            metrics.pids.current,
            metrics.hugetlb.len()
        );
        ensure(
            count == 3 && metrics.memory.usage > 0 && metrics.cpu.usage_usec > 0 && metrics.pids.current == 3,
            format!("{count} {metrics:?}"),
        )
    }

    async fn kill(&self) -> Outcome {
        let id = self.sleeper().await?;
        self.kill_it(&id, 9, false).await?;
        let status = self.wait(&id, "").await?;
        let again = self.kill_it(&id, 9, false).await.map(|_| ()).err().map(|e| e.to_string()).unwrap_or_default();
        self.delete(&id, "").await?;
        let gone = self.delete(&id, "").await.is_err();
        ensure(status == 137 && again.contains("NOT_FOUND") && gone, format!("{status} {again}"))
    }

    async fn user(&self) -> Outcome {
        let mut spec = spec(&[
            "sh",
            "-c",
            "id -u; id -G; grep -E 'Cap(Eff|Bnd|Amb)|NoNew' /proc/self/status; echo x > /dev/stdout; pwd",
        ]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [7, 8]});
        spec["process"]["cwd"] = json!("/made/by/agent");
        spec["process"]["capabilities"] = json!({});
        let ran = self.run(&spec).await?;
        let want = "1000\n1001 7 8\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\nx\n/made/by/agent\n";
        ensure(ran.out == want, ran.out)
    }

    async fn devices(&self) -> Outcome {
        let ran = self.sh("mknod /tmp/m c 1 1 && (cat /tmp/m >/dev/null 2>/tmp/err; cat /tmp/err); rm -f /tmp/m; head -c 3 /dev/zero | wc -c; echo > /dev/null && echo null; ls /dev | tr '\\n' ' '").await?;
        println!("{}", ran.out);
        ensure(ran.out.contains("Operation not permitted") && ran.out.contains("3\nnull"), ran.out)
    }

    async fn readonly(&self) -> Outcome {
        let mut spec = spec(&[
            "sh",
            "-c",
            "touch /x 2>&1; wc -c < /proc/keys; echo 1 > /proc/sys/kernel/panic; ls /sys/firmware | wc -l",
        ]);
        spec["root"]["readonly"] = json!(true);
        let ran = self.run(&spec).await?;
        ensure(ran.out.contains("Read-only") && ran.out.contains("\n0\n"), ran.out)
    }

    async fn many(&self) -> Outcome {
        let started = Instant::now();
        for _ in 0..20 {
            let ran = self.sh("echo x").await?;
            ensure(ran.out == "x\n", ran.out)?;
        }
        println!("20 containers: {:?}", started.elapsed());
        Ok(())
    }

    async fn eight_execs(&self) -> Outcome {
        let id = self.sleeper().await?;
        let names: Vec<String> = (0..8).map(|n| format!("e{n}")).collect();
        let processes: Vec<Value> = names.iter().map(|n| process(&["echo", n.as_str()])).collect();
        let all = names.iter().zip(&processes).map(|(name, process)| self.exec_in(&id, name, process));
        for (name, ran) in names.iter().zip(futures::future::join_all(all).await) {
            let ran = ran?;
            ensure(ran.out.trim() == name, ran.out)?;
        }
        self.end(&id).await
    }

    async fn seccomp_exec(&self) -> Outcome {
        let mut spec = spec(&["sleep", "1000"]);
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]});
        let id = self.name();
        self.create(&id, &spec, ("", "", ""), false).await?;
        self.start(&id, "").await?;
        let script = "mkdir /tmp/d 2>&1; grep Seccomp: /proc/self/status";
        let ran = self.exec_in(&id, "a", &process(&["sh", "-c", script])).await?;
        let mut privileged = process(&["sh", "-c", script]);
        privileged["noNewPrivileges"] = json!(false);
        let also = self.exec_in(&id, "b", &privileged).await?;
        self.end(&id).await?;
        let good = |out: &str| out.contains("Permission denied") && out.contains("Seccomp:\t2");
        ensure(good(&ran.out) && good(&also.out), format!("{} {}", ran.out, also.out))
    }

    async fn stdout_reopened(&self) -> Outcome {
        let ran = self.sh("echo one > /dev/stdout; echo two > /proc/self/fd/1; ls -l /dev/stdout").await?;
        ensure(ran.out.starts_with("one\ntwo\n"), ran.out)
    }

    async fn shared_pids(&self) -> Outcome {
        let shared = |args: &[&str]| {
            let mut spec = spec(args);
            spec["linux"]["namespaces"][0]["path"] = json!("/run/husk/ns/pid");
            spec
        };
        let id = self.name();
        self.create(&id, &shared(&["sh", "-c", "sleep 4242 & wait"]), ("", "", ""), false).await?;
        self.start(&id, "").await?;
        let other = self.run(&shared(&["sh", "-c", "until ps | grep -q 'sleep 424[2]'; do :; done; ps"])).await?;
        self.kill_it(&id, 9, false).await?;
        self.wait(&id, "").await?;
        self.delete(&id, "").await?;
        let left = self.run(&shared(&["sh", "-c", "ps | grep -c 'sleep 424[2]'"])).await?;
        ensure(other.out.contains("pod-init") && left.out == "0\n", format!("{} {}", other.out, left.out))
    }

    async fn no_process_left(&self) -> Outcome {
        let groups =
            std::fs::read_dir("/proc/1/root/sys/fs/cgroup/husk")?.flatten().filter(|e| e.path().is_dir()).count();
        let dirs = std::fs::read_dir("/proc/1/root/run/husk/tasks")?.count()
            + std::fs::read_dir("/proc/1/root/run/husk/state")?.count();
        let status = std::fs::read_to_string("/proc/1/root/proc/1/status")?;
        let fds = std::fs::read_dir("/proc/1/root/proc/1/fd")?.count();
        let line = |key: &str| status.lines().find(|l| l.starts_with(key)).unwrap_or_default().to_owned();
        println!("agent: {} {} descriptors {fds}", line("VmRSS"), line("Threads"));
        ensure(groups == 0 && dirs == 0, format!("{groups} groups, {dirs} directories left"))
    }
}
