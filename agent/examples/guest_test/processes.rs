//! Checks with several processes: exec, limits, signals, pause, leftovers.

use std::io::Read;
use std::time::{Duration, Instant};

use husk_proto::containerd::api::*;
use husk_proto::containerd::cgroups_v2::metrics::Metrics;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::{Value, json};

use crate::driver::{Driver, Outcome, ctx, ensure, reader, stream};
use crate::spec::{process, spec};

impl Driver {
    pub async fn exec(&self) -> Outcome {
        let id = self.sleeper().await?;
        let ran = self
            .exec_in(&id, "e1", &process(&["sh", "-c", "echo $A $HOME; hostname; ps; cat /proc/self/cgroup; exit 5"]))
            .await?;
        println!("{}", ran.out);
        self.end(&id).await?;
        ensure(ran.status == 5 && ran.out.starts_with("b /root\nbox\n"), ran.out)
    }

    pub async fn exec_missing(&self) -> Outcome {
        let id = self.sleeper().await?;
        let failed = self.exec_in(&id, "e1", &process(&["nosuch"])).await;
        let deleted = self.delete(&id, "e1").await;
        self.end(&id).await?;
        let text = failed.err().map(|e| e.to_string()).unwrap_or_default();
        let want =
            "exec failed: unable to start container process: exec: \\\"nosuch\\\": executable file not found in $PATH";
        ensure(text.contains(want) && deleted.is_ok(), text)
    }

    pub async fn exec_terminal(&self) -> Outcome {
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

    pub async fn resource_limits(&self) -> Outcome {
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
            format!("limits at create {text:?}, after the update {:?}", ran.out),
        )
    }

    pub async fn oom_kill(&self) -> Outcome {
        let mut spec = spec(&["sh", "-c", "x=$(dd if=/dev/zero bs=1M count=200 | tr '\\0' x); echo survived"]);
        spec["linux"]["resources"] = json!({"memory": {"limit": 20971520, "swap": 20971520}});
        let ran = self.run(&spec).await?;
        ensure(ran.status != 0, format!("exit status {}, output {}", ran.status, ran.out))
    }

    pub async fn pause_and_resume(&self) -> Outcome {
        let id = self.sleeper().await?;
        self.task.pause(ctx(), &PauseRequest { id: id.clone(), ..Default::default() }).await?;
        let state = self.task.state(ctx(), &StateRequest { id: id.clone(), ..Default::default() }).await?;
        let refused = self.exec_in(&id, "p", &process(&["true"])).await.is_err();
        self.task.resume(ctx(), &ResumeRequest { id: id.clone(), ..Default::default() }).await?;
        let after = self.task.state(ctx(), &StateRequest { id: id.clone(), ..Default::default() }).await?;
        self.end(&id).await?;
        ensure(
            state.status() == Status::PAUSED && after.status() == Status::RUNNING && refused,
            format!("state while paused {state:?}, state after resume {after:?}, exec refused: {refused}"),
        )
    }

    pub async fn pids_and_stats(&self) -> Outcome {
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
            format!("{count} processes instead of 3, or a metric of 0: {metrics:?}"),
        )
    }

    pub async fn kill(&self) -> Outcome {
        let id = self.sleeper().await?;
        self.signal(&id, 9, false).await?;
        let status = self.wait(&id, "").await?;
        let again = self.signal(&id, 9, false).await.map(|_| ()).err().map(|e| e.to_string()).unwrap_or_default();
        self.delete(&id, "").await?;
        let gone = self.delete(&id, "").await.is_err();
        ensure(
            status == 137 && again.contains("NOT_FOUND") && gone,
            format!("exit status {status}, error of the second kill {again:?}, second delete failed: {gone}"),
        )
    }

    pub async fn twenty_containers(&self) -> Outcome {
        let started = Instant::now();
        for _ in 0..20 {
            let ran = self.sh("echo x").await?;
            ensure(ran.out == "x\n", ran.out)?;
        }
        println!("20 containers: {:?}", started.elapsed());
        Ok(())
    }

    pub async fn eight_execs(&self) -> Outcome {
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

    /// An exec whose process hangs before it executes its program: the container's cgroup is frozen.
    pub async fn killed_exec(&self) -> Outcome {
        let id = self.sleeper().await?;
        let freeze = |value: &str| std::fs::write(format!("/proc/1/root/sys/fs/cgroup/husk/{id}/cgroup.freeze"), value);
        freeze("1")?;
        let (task, container) = (self.task.clone(), id.clone());
        let killing = async {
            let request = KillRequest { id: container, exec_id: "e".into(), signal: 9, ..Default::default() };
            // The first requests can be earlier than the exec.
            while task.kill(ctx(), &request).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let process = process(&["true"]);
        let (ran, ()) = tokio::join!(self.exec_in(&id, "e", &process), killing);
        freeze("0")?;
        self.end(&id).await?;
        // If the exec was killed before its start, the start has failed.
        let status = ran.map_or(137, |ran| ran.status);
        ensure(status == 137, format!("exit status {status}"))
    }

    pub async fn seccomp_exec(&self) -> Outcome {
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
        ensure(
            good(&ran.out) && good(&also.out),
            format!("output with no_new_privs {:?}, without {:?}", ran.out, also.out),
        )
    }

    pub async fn shared_pids(&self) -> Outcome {
        let shared = |args: &[&str]| {
            let mut spec = spec(args);
            spec["linux"]["namespaces"][0]["path"] = json!("/run/husk/ns/pid");
            spec
        };
        let id = self.name();
        self.create(&id, &shared(&["sh", "-c", "sleep 4242 & wait"]), ("", "", ""), false).await?;
        self.start(&id, "").await?;
        let other = self.run(&shared(&["sh", "-c", "until ps | grep -q 'sleep 424[2]'; do :; done; ps"])).await?;
        self.signal(&id, 9, false).await?;
        self.wait(&id, "").await?;
        self.delete(&id, "").await?;
        let left = self.run(&shared(&["sh", "-c", "ps | grep -c 'sleep 424[2]'"])).await?;
        ensure(
            other.out.contains("pod-init") && left.out == "0\n",
            format!("processes {:?}, left after the kill {:?}", other.out, left.out),
        )
    }

    pub async fn no_leftovers(&self) -> Outcome {
        let groups =
            std::fs::read_dir("/proc/1/root/sys/fs/cgroup/husk")?.flatten().filter(|e| e.path().is_dir()).count();
        let dirs = std::fs::read_dir("/proc/1/root/run/husk/tasks")?.count()
            + std::fs::read_dir("/proc/1/root/run/husk/state")?.count();
        let status = std::fs::read_to_string("/proc/1/root/proc/1/status")?;
        let fds = std::fs::read_dir("/proc/1/root/proc/1/fd")?.count();
        let line = |key: &str| status.lines().find(|l| l.starts_with(key)).unwrap_or_default().to_owned();
        println!("agent: {} {} fds {fds}", line("VmRSS"), line("Threads"));
        ensure(groups == 0 && dirs == 0, format!("left over: {groups} cgroups, {dirs} directories"))
    }
}
