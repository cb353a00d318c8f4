//! The requests of the model test, as a client sends them.

use std::fs;

use husk_proto::containerd::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest,
    KillRequest, PauseRequest, PidsRequest, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StateRequest, StatsRequest, UpdateTaskRequest, WaitRequest,
};
use husk_proto::containerd::sandbox_api::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest,
    ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use ttrpc::Request;

use super::model::{Model, SANDBOX};
use crate::oci::bundle::tests::sample;

/// The container that most requests name.
pub const CONTAINER: &str = "c";
/// Another container of the pod. While it exists, the pod does not end with [`CONTAINER`].
pub const OTHER: &str = "other";
/// An exec of [`CONTAINER`].
pub const EXEC: &str = "e";

/// A request to the shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Create,
    Start,
    Exec,
    StartExec,
    Term,
    Kill,
    KillExec,
    Delete,
    DeleteExec,
    Pause,
    Resume,
    Update,
    CloseIo,
    Resize,
    Checkpoint,
    Wait,
    WaitExec,
    State,
    Pids,
    Stats,
    Connect,
    Shutdown,
    CreateSandbox,
    StartSandbox,
    StopSandbox,
    ShutdownSandbox,
    SandboxStatus,
    WaitSandbox,
    PingSandbox,
    Platform,
    SandboxMetrics,
}

/// All requests.
pub const ALL: [Call; 31] = [
    Call::Create,
    Call::Start,
    Call::Exec,
    Call::StartExec,
    Call::Term,
    Call::Kill,
    Call::KillExec,
    Call::Delete,
    Call::DeleteExec,
    Call::Pause,
    Call::Resume,
    Call::Update,
    Call::CloseIo,
    Call::Resize,
    Call::Checkpoint,
    Call::Wait,
    Call::WaitExec,
    Call::State,
    Call::Pids,
    Call::Stats,
    Call::Connect,
    Call::Shutdown,
    Call::CreateSandbox,
    Call::StartSandbox,
    Call::StopSandbox,
    Call::ShutdownSandbox,
    Call::SandboxStatus,
    Call::WaitSandbox,
    Call::PingSandbox,
    Call::Platform,
    Call::SandboxMetrics,
];

/// A request for another container than [`CONTAINER`].
pub fn create(model: &Model, container: &str) -> CreateTaskRequest {
    let bundle = model.dir.path().join(container);
    let (stdin, stdout) = (bundle.join("stdin"), bundle.join("stdout"));
    if !bundle.exists() {
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let mut spec = sample();
        spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": SANDBOX,
        });
        // The pod has to grow for the container.
        spec["linux"]["resources"] = json!({ "cpu": { "quota": 200_000, "period": 100_000 } });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        mkfifo(&stdin, Mode::S_IRWXU).unwrap();
        mkfifo(&stdout, Mode::S_IRWXU).unwrap();
    }
    let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    CreateTaskRequest {
        id: container.to_owned(),
        bundle: text(&bundle),
        stdin: text(&stdin),
        stdout: text(&stdout),
        ..Default::default()
    }
}

impl Call {
    /// Returns whether the request ends only with a process or with the sandbox.
    pub fn is_wait(self) -> bool {
        matches!(self, Self::Wait | Self::WaitExec | Self::WaitSandbox)
    }

    /// Returns the request.
    pub fn request(self, model: &Model) -> Request {
        let (id, exec_id, sandbox_id) = (CONTAINER.to_owned(), EXEC.to_owned(), SANDBOX.to_owned());
        let stdout = model.dir.path().join("exec-stdout");
        if !stdout.exists() {
            mkfifo(&stdout, Mode::S_IRWXU).unwrap();
        }
        let exec = || {
            let value =
                json!({ "args": ["true"], "cwd": "/", "user": { "uid": 0, "gid": 0 } }).to_string().into_bytes();
            let stdout = stdout.to_str().unwrap().to_owned();
            let spec = Some(Any { value, ..Default::default() }).into();
            ExecProcessRequest { id: id.clone(), exec_id: exec_id.clone(), stdout, spec, ..Default::default() }
        };
        let update = || {
            let value = json!({ "cpu": { "quota": 100_000, "period": 100_000 } }).to_string().into_bytes();
            Some(Any { value, ..Default::default() }).into()
        };
        let kill = |signal: i32, exec_id: String| {
            bytes(&KillRequest { id: id.clone(), exec_id, signal: signal.unsigned_abs(), ..Default::default() })
        };
        let (id, none) = (id.clone(), String::new());
        let (method, payload) = match self {
            Self::Create => ("Create", bytes(&create(model, CONTAINER))),
            Self::Start => ("Start", bytes(&StartRequest { id, ..Default::default() })),
            Self::Exec => ("Exec", bytes(&exec())),
            Self::StartExec => ("Start", bytes(&StartRequest { id, exec_id, ..Default::default() })),
            Self::Term => ("Kill", kill(libc::SIGTERM, none)),
            Self::Kill => ("Kill", kill(libc::SIGKILL, none)),
            Self::KillExec => ("Kill", kill(libc::SIGKILL, exec_id)),
            Self::Delete => ("Delete", bytes(&DeleteRequest { id, ..Default::default() })),
            Self::DeleteExec => ("Delete", bytes(&DeleteRequest { id, exec_id, ..Default::default() })),
            Self::Pause => ("Pause", bytes(&PauseRequest { id, ..Default::default() })),
            Self::Resume => ("Resume", bytes(&ResumeRequest { id, ..Default::default() })),
            Self::Update => ("Update", bytes(&UpdateTaskRequest { id, resources: update(), ..Default::default() })),
            Self::CloseIo => ("CloseIO", bytes(&CloseIORequest { id, stdin: true, ..Default::default() })),
            Self::Resize => ("ResizePty", bytes(&ResizePtyRequest { id, width: 80, height: 25, ..Default::default() })),
            Self::Checkpoint => ("Checkpoint", bytes(&CheckpointTaskRequest { id, ..Default::default() })),
            Self::Wait => ("Wait", bytes(&WaitRequest { id, ..Default::default() })),
            Self::WaitExec => ("Wait", bytes(&WaitRequest { id, exec_id, ..Default::default() })),
            Self::State => ("State", bytes(&StateRequest { id, ..Default::default() })),
            Self::Pids => ("Pids", bytes(&PidsRequest { id, ..Default::default() })),
            Self::Stats => ("Stats", bytes(&StatsRequest { id, ..Default::default() })),
            Self::Connect => ("Connect", bytes(&ConnectRequest { id, ..Default::default() })),
            Self::Shutdown => ("Shutdown", bytes(&ShutdownRequest { id, ..Default::default() })),
            Self::CreateSandbox => ("CreateSandbox", bytes(&CreateSandboxRequest { sandbox_id, ..Default::default() })),
            Self::StartSandbox => ("StartSandbox", bytes(&StartSandboxRequest { sandbox_id, ..Default::default() })),
            Self::StopSandbox => ("StopSandbox", bytes(&StopSandboxRequest { sandbox_id, ..Default::default() })),
            Self::ShutdownSandbox => {
                ("ShutdownSandbox", bytes(&ShutdownSandboxRequest { sandbox_id, ..Default::default() }))
            }
            Self::SandboxStatus => ("SandboxStatus", bytes(&SandboxStatusRequest { sandbox_id, ..Default::default() })),
            Self::WaitSandbox => ("WaitSandbox", bytes(&WaitSandboxRequest { sandbox_id, ..Default::default() })),
            Self::PingSandbox => ("PingSandbox", bytes(&PingRequest { sandbox_id, ..Default::default() })),
            Self::Platform => ("Platform", bytes(&PlatformRequest { sandbox_id, ..Default::default() })),
            Self::SandboxMetrics => {
                ("SandboxMetrics", bytes(&SandboxMetricsRequest { sandbox_id, ..Default::default() }))
            }
        };
        let service = if method.ends_with("Sandbox")
            || matches!(self, Self::SandboxStatus | Self::Platform)
            || self == Self::SandboxMetrics
        {
            "containerd.runtime.sandbox.v1.Sandbox"
        } else {
            "containerd.task.v2.Task"
        };
        Request { service: service.to_owned(), method: method.to_owned(), payload, ..Default::default() }
    }
}

pub fn bytes(message: &impl Message) -> Vec<u8> {
    message.write_to_bytes().unwrap()
}
