//! Exec, and Start of what it made.

use std::sync::{Arc, PoisonError};

use husk_proto::containerd::api::ExecProcessRequest;
use libcontainer::oci_spec::runtime::Process as ProcessSpec;

use super::error::{Fault, unknown};
use super::helper::Job;
use super::kill::Mark;
use super::process::{Phase, Process, StreamNames};
use super::{Container, Tasks, spec};
use crate::helper::protocol::{ExecRequest, Request};
use crate::io::console::Console;
use crate::io::stdio::{self, Relays, StdioStreams};
use crate::sandbox::users::uid_in_guest;

impl Tasks {
    /// Notes a further process; [`Tasks::start_exec`] starts it.
    ///
    /// # Errors
    /// [`Fault`] when the request makes no sense or its name is taken.
    pub async fn exec(&self, request: ExecProcessRequest) -> Result<(), Fault> {
        let container = self.get(&request.id)?;
        if request.exec_id.is_empty() || request.exec_id.len() > 100 {
            return Err(Fault::InvalidArgument(format!("exec id {:?}", request.exec_id)));
        }
        if container.process(&request.exec_id).is_ok() {
            return Err(Fault::AlreadyExists(format!("exec {}", request.exec_id)));
        }
        let mut process: ProcessSpec = serde_json::from_slice(&request.spec.value)
            .map_err(|error| Fault::InvalidArgument(format!("process: {error}")))?;
        spec::adapt_process(&mut process);
        process.set_terminal(Some(request.terminal));
        if process.oom_score_adj().is_none() {
            process.set_oom_score_adj(container.oom_score_adj);
        }
        let names = StreamNames {
            terminal: request.terminal,
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
        };
        let dialled = self.dialled(&names).await?;
        let process = Process::new(&request.exec_id, names, Some((process, dialled)));
        let mut execs = container.execs.lock().unwrap_or_else(PoisonError::into_inner);
        if execs.contains_key(&request.exec_id) {
            return Err(Fault::AlreadyExists(format!("exec {}", request.exec_id)));
        }
        execs.insert(request.exec_id, process);
        Ok(())
    }

    /// Starts what [`Tasks::exec`] noted.
    ///
    /// # Errors
    /// [`Fault`], worded as runc's shim words it.
    pub async fn start_exec(&self, container: &Arc<Container>, process: &Arc<Process>) -> Result<i32, Fault> {
        let Phase::Running(init) = container.init.phase() else {
            return Err(exec_failed("cannot exec in a stopped container"));
        };
        if container.is_paused() {
            return Err(exec_failed("cannot exec in a paused container (use --ignore-paused to override)"));
        }
        let pending = process.pending.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((spec, dialled)) = pending else {
            return Err(Fault::FailedPrecondition("the process has been started".into()));
        };
        process.advance(Phase::Starting);
        let result = self.start_pending(container, process, init, spec, dialled).await;
        if result.is_err() {
            // As with runc a process that could not be started has ended, and can be deleted.
            let at_ns = crate::reaper::now_ns();
            process.advance(Phase::Stopped(0, crate::reaper::ProcessExit { status: 255, at_ns }));
        }
        result
    }

    async fn start_pending(
        &self,
        container: &Arc<Container>,
        process: &Arc<Process>,
        init: i32,
        spec: ProcessSpec,
        dialled: StdioStreams,
    ) -> Result<i32, Fault> {
        let _guard = self.reaper.expect();
        let uid = uid_in_guest(self.sandbox.id_mappings().as_ref(), spec.user().uid());
        let (console, relays, io, dialled) = if process.names.terminal {
            let console = Console::listen().map_err(unknown("console socket"))?;
            (Some(console), None, stdio::null_stdio().map_err(unknown("standard streams"))?, Some(dialled))
        } else {
            let (relays, io) = Relays::pipes(dialled, uid).map_err(unknown("standard streams"))?;
            (None, Some(relays), io, None)
        };
        let request = Request::Exec(Box::new(ExecRequest {
            init,
            process: spec,
            seccomp: container.seccomp.clone(),
            cgroup: container.cgroup.path().to_owned(),
            console: console.as_ref().map(|console| console.path().to_owned()),
        }));
        let job = Job {
            role: crate::helper::EXEC,
            request,
            request_file: &container.file(&process.exec_id, "req"),
            response_file: &container.file(&process.exec_id, "rsp"),
            io,
            console,
        };
        let (pid, master) = self
            .help(job)
            .await
            .map_err(|reason| exec_failed(&format!("unable to start container process: {reason}")))?;
        let relays = match (relays, &master, dialled) {
            (Some(relays), _, _) => relays,
            (None, Some(master), Some(dialled)) => Relays::terminal(dialled, master).map_err(unknown("terminal"))?,
            _ => return Err(Fault::Unknown("no terminal came".into())),
        };
        if let Some(mark) = Mark::of(pid, init) {
            let _ = process.mark.set(mark);
        }
        process.attach(relays.start(), master);
        process.advance(Phase::Running(pid));
        self.follow(container, process, pid);
        Ok(pid)
    }
}

fn exec_failed(reason: &str) -> Fault {
    Fault::Unknown(format!("OCI runtime exec failed: exec failed: {reason}"))
}
