//! Functions that call the Task API and connect the stdio streams of processes.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use husk_proto::agent::CreateOptions;
use husk_proto::containerd::api::*;
use husk_proto::containerd::shim_async::TaskClient;
use husk_proto::{CREATE_OPTIONS_TYPE_URL, ports, stream::Header};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::Value;
use ttrpc::context::{self, Context};

use crate::spec::spec;

pub type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

static TOKEN: AtomicU64 = AtomicU64::new(1);
static NAME: AtomicU64 = AtomicU64::new(1);

pub fn ctx() -> Context {
    context::with_timeout(120_000_000_000)
}

pub struct Driver {
    pub task: TaskClient,
    pub rootfs: String,
}

pub async fn timed<T, E>(what: &str, future: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let started = Instant::now();
    let result = future.await;
    println!("time {what}: {:?}", started.elapsed());
    result
}

pub fn dial(port: u32) -> std::io::Result<File> {
    Ok(husk_base::sys::vsock::connect(libc::VMADDR_CID_LOCAL, port)?.into())
}

pub fn stream() -> Outcome<(String, File)> {
    let token = TOKEN.fetch_add(1, Ordering::Relaxed);
    let mut file = dial(ports::STREAM)?;
    file.write_all(&Header { token }.encode())?;
    Ok((token.to_string(), file))
}

pub fn reader(mut file: File) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let _ = file.read_to_end(&mut all);
        all
    })
}

pub fn half_close(file: &File) {
    use std::os::fd::AsRawFd;
    let _ = nix::sys::socket::shutdown(file.as_raw_fd(), nix::sys::socket::Shutdown::Write);
}

pub fn ensure(condition: bool, message: impl Into<String>) -> Outcome {
    if condition { Ok(()) } else { Err(message.into().into()) }
}

pub struct RunResult {
    pub status: u32,
    pub out: String,
}

impl Driver {
    pub fn name(&self) -> String {
        format!("c{}", NAME.fetch_add(1, Ordering::Relaxed))
    }

    pub async fn create(&self, id: &str, spec: &Value, io: (&str, &str, &str), terminal: bool) -> ttrpc::Result<u32> {
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
            options: MessageField::some(Any { type_url: CREATE_OPTIONS_TYPE_URL.into(), value, ..Default::default() }),
            ..Default::default()
        };
        Ok(self.task.create(ctx(), &request).await?.pid)
    }

    pub async fn start(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        Ok(self.task.start(ctx(), &request).await?.pid)
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        Ok(self.task.wait(ctx(), &request).await?.exit_status)
    }

    pub async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        Ok(self.task.delete(ctx(), &request).await?.exit_status)
    }

    pub async fn signal(&self, id: &str, signal: u32, all: bool) -> ttrpc::Result<()> {
        self.task.kill(ctx(), &KillRequest { id: id.into(), signal, all, ..Default::default() }).await.map(|_| ())
    }

    pub async fn run(&self, spec: &Value) -> Outcome<RunResult> {
        let id = self.name();
        let (token, file) = stream()?;
        let out = reader(file);
        timed("create", self.create(&id, spec, ("", &token, &token.replace(&token, "")), false)).await?;
        timed("start", self.start(&id, "")).await?;
        let status = timed("wait", self.wait(&id, "")).await?;
        let out = String::from_utf8_lossy(&out.join().unwrap_or_default()).into_owned();
        timed("delete", self.delete(&id, "")).await?;
        Ok(RunResult { status, out })
    }

    pub async fn sh(&self, script: &str) -> Outcome<RunResult> {
        self.run(&spec(&["sh", "-c", script])).await
    }

    pub async fn sleeper(&self) -> Outcome<String> {
        let id = self.name();
        self.create(&id, &spec(&["sleep", "1000"]), ("", "", ""), false).await?;
        self.start(&id, "").await?;
        Ok(id)
    }

    pub async fn end(&self, id: &str) -> Outcome {
        self.signal(id, 9, true).await?;
        self.wait(id, "").await?;
        self.delete(id, "").await?;
        Ok(())
    }

    pub async fn exec_in(&self, id: &str, exec_id: &str, process: &Value) -> Outcome<RunResult> {
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
        Ok(RunResult { status, out })
    }
}
