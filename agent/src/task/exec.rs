//! The Exec request, and the Start request of an exec.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;

use husk_base::async_fd;
use husk_base::sync::lock;
use husk_base::sys::fd::set_nonblocking;
use husk_base::sys::pidfd;
use husk_proto::containerd::api::ExecProcessRequest;
use libcontainer::oci_spec::runtime::Process as ProcessSpec;
use tokio::io::Interest;

use super::helper::HelperJob;
use super::kill::EXIT_STATUS_KILLED;
use super::process::{Phase, Process, StreamTokens};
use super::time_namespace::TimeNamespace;
use super::{Container, Tasks, kill, spec};
use crate::error::{ServiceError, failed, malformed};
use crate::helper::protocol::{ExecRequest, Request};
use crate::id_mappings::uid_in_guest;
use crate::io::console::Console;
use crate::io::stdio::{self, Relays, StdioStreams};
use crate::reaper::{ProcessExit, now_ns};

/// Exit status of a process that could not be started, as in runc's shim.
const EXIT_STATUS_NOT_STARTED: u32 = 255;

impl Tasks {
    /// Registers an exec. [`Tasks::start_exec`] starts it.
    pub async fn exec(&self, request: ExecProcessRequest) -> Result<(), ServiceError> {
        let tokens = StreamTokens {
            terminal: request.terminal,
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
        };
        // Take the streams first, so that a request that fails closes its streams. Otherwise, the streams would stay
        // in the table of `Streams`.
        let streams = self.take_streams(&tokens).await?;
        let container = self.get(&request.id)?;
        if request.exec_id.is_empty() || request.exec_id.len() > 100 {
            return Err(ServiceError::InvalidArgument(format!(
                "invalid exec id {:?}: must have 1 to 100 bytes",
                request.exec_id
            )));
        }
        if container.process(&request.exec_id).is_ok() {
            return Err(ServiceError::AlreadyExists(format!("exec {}", request.exec_id)));
        }
        let mut process: ProcessSpec =
            serde_json::from_slice(&request.spec.value).map_err(malformed("failed to parse the process"))?;
        spec::adapt_process(&mut process);
        self.sandbox.policy.check_exec(&container.id, &container.process, &process)?;
        process.set_terminal(Some(request.terminal));
        if process.oom_score_adj().is_none() {
            process.set_oom_score_adj(container.oom_score_adj);
        }
        let process = Process::new(&request.exec_id, tokens, Some((process, streams)));
        let mut execs = lock(&container.execs);
        if execs.contains_key(&request.exec_id) {
            return Err(ServiceError::AlreadyExists(format!("exec {}", request.exec_id)));
        }
        execs.insert(request.exec_id, process);
        Ok(())
    }

    /// Starts an exec that [`Tasks::exec`] has registered.
    ///
    /// # Errors
    /// Uses the error texts of runc's shim.
    pub async fn start_exec(&self, container: &Arc<Container>, process: &Arc<Process>) -> Result<i32, ServiceError> {
        let Phase::Running(init_pid) = container.init.phase() else {
            return Err(exec_failed("cannot exec in a stopped container"));
        };
        if container.is_paused() {
            return Err(exec_failed("cannot exec in a paused container (use --ignore-paused to override)"));
        }
        let pending = lock(&process.pending).take();
        let Some((spec, streams)) = pending else {
            return Err(ServiceError::FailedPrecondition("the process has already been started".into()));
        };
        process.advance(Phase::Starting);
        let result = self.start_pending(container, process, init_pid, spec, streams).await;
        let (killed, child) = process.end_start();
        let Err(error) = result else { return result };
        // The helper or the agent may have failed after the helper had created the process.
        if let Some(child) = child {
            let _ = pidfd::send_signal(child.as_fd(), libc::SIGKILL);
        }
        // As with runc, a process that failed to start counts as exited and can be deleted.
        let status = if killed { EXIT_STATUS_KILLED } else { EXIT_STATUS_NOT_STARTED };
        process.advance(Phase::Stopped(0, ProcessExit { status, at_ns: now_ns() }));
        Err(if killed { exec_failed("the process was killed while it was being started") } else { error })
    }

    async fn start_pending(
        &self,
        container: &Arc<Container>,
        process: &Arc<Process>,
        init_pid: i32,
        spec: ProcessSpec,
        streams: StdioStreams,
    ) -> Result<i32, ServiceError> {
        let _guard = self.reaper.keep_unclaimed_exits();
        let uid = uid_in_guest(self.sandbox.id_mappings().as_ref(), spec.user().uid());
        let (console, relays, io, streams) = if process.tokens.terminal {
            let console = Console::listen().map_err(failed("create the console socket"))?;
            (Some(console), None, stdio::null_stdio().map_err(failed("open /dev/null"))?, Some(streams))
        } else {
            let (relays, io) = Relays::pipes(streams, uid).map_err(failed("create pipes for the standard streams"))?;
            (None, Some(relays), io, None)
        };
        let (pid_reader, pid_writer) = io::pipe().map_err(failed("create the pipe for the PID"))?;
        let request = Request::Exec(Box::new(ExecRequest {
            pid_pipe: pid_writer.as_raw_fd(),
            init_pid,
            process: spec,
            seccomp: container.seccomp.clone(),
            cgroup: container.cgroup.path().to_owned(),
            console: console.as_ref().map(|console| console.path().to_owned()),
        }));
        let job = HelperJob {
            role: crate::helper::EXEC,
            request,
            request_file: &container.helper_file(&process.exec_id, "req"),
            response_file: &container.helper_file(&process.exec_id, "rsp"),
            io,
            console,
            inherited: Some(pid_writer.into()),
        };
        let mut helper = pin!(self.run_helper(job));
        let ended = tokio::select! {
            biased;
            created = read_pid(pid_reader.into()) => {
                if let Ok(Some(pid)) = created {
                    self.record_child(process, pid, init_pid);
                    if process.is_start_killed() {
                        // Best effort. The process itself is dead.
                        let _ = kill::exec(container, process).await;
                    }
                }
                helper.await
            }
            ended = &mut helper => ended,
        };
        let (pid, master) =
            ended.map_err(|reason| exec_failed(&format!("unable to start container process: {reason}")))?;
        let relays = match (relays, &master, streams) {
            (Some(relays), _, _) => relays,
            (None, Some(master), Some(streams)) => {
                Relays::terminal(streams, master).map_err(failed("set up the terminal's relays"))?
            }
            _ => return Err(ServiceError::Unknown("failed to receive the terminal from the helper".into())),
        };
        process.attach_io(relays.start(), master);
        process.advance(Phase::Running(pid));
        self.watch_exit(container, process, pid);
        Ok(pid)
    }

    /// Stores the process `pid`, which the helper has just created for an exec.
    fn record_child(&self, process: &Process, pid: i32, init_pid: i32) {
        // If this fails, the process has already exited.
        let Ok(child) = pidfd::open(pid) else { return };
        // Only the async thread reaps. Therefore, no other process can get the PID during this function.
        self.reaper.forget_earlier_exit(pid);
        let namespace = TimeNamespace::of_exec(pid, init_pid);
        if let Some(namespace) = namespace {
            let _ = process.time_namespace.set(namespace);
        }
        process.set_child(child);
    }
}

/// Reads the PID of an exec's process from the helper. Returns `None` if the helper has ended without creating the
/// process.
async fn read_pid(pipe: OwnedFd) -> io::Result<Option<i32>> {
    set_nonblocking(&pipe)?;
    let pipe = async_fd::register(File::from(pipe), Interest::READABLE)?;
    let mut pid = [0; size_of::<i32>()];
    // A write of a few bytes to a pipe is atomic (pipe(7)).
    let read = pipe.async_io(Interest::READABLE, |mut file| file.read(&mut pid)).await?;
    Ok((read == pid.len()).then(|| i32::from_ne_bytes(pid)))
}

fn exec_failed(reason: &str) -> ServiceError {
    ServiceError::Unknown(format!("OCI runtime exec failed: exec failed: {reason}"))
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::os::unix::net::UnixStream;

    use husk_proto::containerd::api::CreateTaskRequest;

    use super::*;
    use crate::io::streams::Streams;

    /// Adds a stream with this token to the table. Returns the host's end.
    fn connect(streams: &Streams, token: u64) -> UnixStream {
        let (host, guest) = UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        streams.insert(token, guest.into());
        host
    }

    #[tokio::test]
    async fn request_that_fails_closes_its_streams() {
        let streams = Streams::default();
        let tasks = Tasks::new(Default::default(), streams.clone(), Default::default(), Default::default());
        let mut hosts: Vec<UnixStream> = (1..=4).map(|token| connect(&streams, token)).collect();
        assert_eq!(hosts[0].read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        let exec = ExecProcessRequest {
            id: "none".into(),
            exec_id: "e".into(),
            stdin: "1".into(),
            stdout: "2".into(),
            ..Default::default()
        };
        assert!(matches!(tasks.exec(exec).await, Err(ServiceError::NotFound(_))));
        let create =
            CreateTaskRequest { id: "..".into(), stdout: "3".into(), stderr: "4".into(), ..Default::default() };
        assert!(matches!(tasks.create(create).await, Err(ServiceError::InvalidArgument(_))));
        for host in &mut hosts {
            assert_eq!(host.read(&mut [0]).unwrap(), 0);
        }
    }
}
