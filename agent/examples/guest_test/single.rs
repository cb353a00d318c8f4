//! Checks with one process: its output, input, privileges and environment.

use std::io::{Read, Write};

use husk_proto::containerd::api::*;
use serde_json::json;

use crate::driver::{Driver, Outcome, ctx, ensure, half_close, reader, stream, timed};
use crate::spec::spec;

impl Driver {
    pub async fn prints_output(&self) -> Outcome {
        let ran =
            self.sh("echo hello; hostname; pwd; echo $A $HOME; id; ls /proc/self/fd | wc -l; cat /proc/1/comm").await?;
        println!("{}", ran.out);
        ensure(ran.status == 0 && ran.out.starts_with("hello\nbox\n/\nb /root\n"), ran.out)
    }

    pub async fn exit_code(&self) -> Outcome {
        let ran = self.sh("exit 3").await?;
        ensure(ran.status == 3, format!("exit status {} instead of 3", ran.status))
    }

    async fn fails(&self, args: &[&str], want: &str) -> Outcome {
        let id = self.name();
        match self.create(&id, &spec(args), ("", "", ""), false).await {
            Ok(_) => Err("create succeeded, but should have failed".into()),
            Err(error) => {
                let left = std::path::Path::new("/proc/1/root/sys/fs/cgroup/husk").join(&id).exists();
                ensure(
                    error.to_string().contains(want) && !left,
                    format!("create failed with {error}; cgroup left: {left}"),
                )
            }
        }
    }

    pub async fn missing_program(&self) -> Outcome {
        self.fails(&["nosuch"], "error during container init: exec: \\\"nosuch\\\": executable file not found in $PATH")
            .await
    }

    pub async fn missing_program_path(&self) -> Outcome {
        self.fails(&["/no/such"], "exec: \\\"/no/such\\\": stat /no/such: no such file or directory").await
    }

    pub async fn non_executable_program(&self) -> Outcome {
        self.fails(&["/etc/passwd"], "exec: \\\"/etc/passwd\\\": permission denied").await
    }

    pub async fn stdin(&self) -> Outcome {
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
        let status = timed("64 MiB of input", self.wait(&id, "")).await?;
        let out = out.join().unwrap_or_default();
        self.delete(&id, "").await?;
        drop(writing);
        ensure(
            status == 0 && out == b"67108864\n",
            format!("exit status {status}, output {:?}", String::from_utf8_lossy(&out)),
        )
    }

    pub async fn large_output(&self) -> Outcome {
        let ran = timed("64 MiB of output", self.sh("dd if=/dev/zero bs=1M count=64 2>/dev/null")).await?;
        ensure(ran.out.len() == 64 << 20, format!("received {} bytes instead of 64 MiB", ran.out.len()))
    }

    pub async fn terminal(&self) -> Outcome {
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

    pub async fn unprivileged_user(&self) -> Outcome {
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

    pub async fn devices(&self) -> Outcome {
        let ran = self.sh("mknod /tmp/m c 1 1 && (cat /tmp/m >/dev/null 2>/tmp/err; cat /tmp/err); rm -f /tmp/m; head -c 3 /dev/zero | wc -c; echo > /dev/null && echo null; ls /dev | tr '\\n' ' '").await?;
        println!("{}", ran.out);
        ensure(ran.out.contains("Operation not permitted") && ran.out.contains("3\nnull"), ran.out)
    }

    pub async fn readonly_root(&self) -> Outcome {
        let mut spec = spec(&[
            "sh",
            "-c",
            "touch /x 2>&1; wc -c < /proc/keys; echo 1 > /proc/sys/kernel/panic; ls /sys/firmware | wc -l",
        ]);
        spec["root"]["readonly"] = json!(true);
        let ran = self.run(&spec).await?;
        ensure(ran.out.contains("Read-only") && ran.out.contains("\n0\n"), ran.out)
    }

    pub async fn stdout_reopened(&self) -> Outcome {
        let ran = self.sh("echo one > /dev/stdout; echo two > /proc/self/fd/1; ls -l /dev/stdout").await?;
        ensure(ran.out.starts_with("one\ntwo\n"), ran.out)
    }
}
