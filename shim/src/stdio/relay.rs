//! The tasks that copy the streams of one process.

use std::{
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use husk_base::async_fd::register;
use husk_base::sync::lock;
use tokio::{io::Interest, net::UnixStream, sync::watch, task::AbortHandle};

use super::{
    Stdio, StdioError, Streams,
    copy::{self, Sink},
    logger::LoggerHandle,
    target::{Input, Output},
};

/// The copy tasks of one process. Dropping the relay stops the tasks and closes containerd's ends.
#[derive(Debug)]
pub struct Relay {
    tasks: Vec<AbortHandle>,
    /// Number of outputs that have not ended yet.
    open: watch::Receiver<usize>,
    /// Bytes of output copied so far.
    copied: Arc<AtomicU64>,
    write_end: Mutex<Option<OwnedFd>>,
    /// The logger's handle. When the relay drops the handle, the timeout for the logger's exit begins.
    _logger: Option<LoggerHandle>,
}

impl Relay {
    pub(super) fn start(stdio: Stdio, streams: Streams) -> Result<Self, StdioError> {
        let Stdio { stdin, stdout, stderr, logger, .. } = stdio;
        let (input, outputs) = match streams {
            Streams::Terminal(stream) => {
                let stream = Arc::new(stream);
                (Some(Arc::clone(&stream)), vec![(Some(stream), stdout)])
            }
            Streams::Pipes { stdin: input, stdout: out, stderr: err } => {
                (input.map(Arc::new), vec![(out.map(Arc::new), stdout), (err.map(Arc::new), stderr)])
            }
        };
        let (ended, open) = watch::channel(0);
        let ended = Arc::new(ended);
        let copied = Arc::new(AtomicU64::new(0));
        let mut relay = Self { tasks: Vec::new(), open, copied, write_end: Mutex::default(), _logger: logger };
        if let (Some(stream), Some(Input { fifo, write_end })) = (input, stdin) {
            let fifo = register(fifo, Interest::READABLE).map_err(StdioError::Register)?;
            relay.write_end = Mutex::new(Some(write_end));
            let task = tokio::spawn(async move { copy::input(&fifo, &stream).await });
            relay.tasks.push(task.abort_handle());
        }
        for (stream, output) in outputs {
            if let (Some(stream), Some(output)) = (stream, output) {
                relay.output(stream, output, &ended)?;
            }
        }
        Ok(relay)
    }

    fn output(
        &mut self,
        stream: Arc<UnixStream>,
        output: Output,
        ended: &Arc<watch::Sender<usize>>,
    ) -> Result<(), StdioError> {
        let sink = match output {
            Output::Pipe(fd) => Sink::Pipe(register(fd, Interest::WRITABLE).map_err(StdioError::Register)?),
            Output::File(file) => Sink::File(file),
        };
        ended.send_modify(|open| *open += 1);
        let (ended, copied) = (Arc::clone(ended), Arc::clone(&self.copied));
        let task = tokio::spawn(async move {
            copy::output(&stream, sink, &copied).await;
            ended.send_modify(|open| *open -= 1);
        });
        self.tasks.push(task.abort_handle());
        Ok(())
    }

    /// Waits until all output is copied. Returns early if no byte was copied for the duration `quiet`, and at the
    /// latest after the duration `total`.
    ///
    /// Without the early return, this function could wait forever. For example, a process may keep the guest's end
    /// open and write to it without end, or the fifo may have no reader.
    pub async fn drain(&self, quiet: Duration, total: Duration) {
        if tokio::time::timeout(total, self.drain_until_quiet(quiet)).await.is_err() {
            tracing::warn!(limit = ?total, "stopped copying the output of a process that has exited");
        }
    }

    async fn drain_until_quiet(&self, quiet: Duration) {
        let mut open = self.open.clone();
        loop {
            let before = self.copied.load(Ordering::Relaxed);
            // An error from `wait_for` means that all copy tasks have ended.
            if tokio::time::timeout(quiet, open.wait_for(|open| *open == 0)).await.is_ok() {
                return;
            }
            if self.copied.load(Ordering::Relaxed) == before {
                return;
            }
        }
    }

    /// Closes the shim's write end of the stdin fifo.
    ///
    /// Stdin then ends when all clients have closed the fifo and the shim has copied the remaining data.
    pub fn close_stdin(&self) {
        let write_end = lock(&self.write_end).take();
        drop(write_end);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}
