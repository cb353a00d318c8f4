//! The running copies of one process' streams.

use super::{
    Stdio, StdioError, Streams,
    copy::{self, Sink},
    logger::Minder,
    target::{Input, Output},
};
use std::{
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{io::Interest, net::UnixStream, sync::watch, task::AbortHandle};

/// The copies; dropping it stops them and closes containerd's ends.
#[derive(Debug)]
pub struct Relay {
    tasks: Vec<AbortHandle>,
    /// How many outputs have not ended yet.
    open: watch::Receiver<usize>,
    /// Bytes of output moved so far.
    moved: Arc<AtomicU64>,
    keeper: Mutex<Option<OwnedFd>>,
    /// Last, so that the logger's input has ended when it is told to end.
    _logger: Option<Minder>,
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
        let moved = Arc::new(AtomicU64::new(0));
        let mut relay = Self { tasks: Vec::new(), open, moved, keeper: Mutex::default(), _logger: logger };
        if let (Some(stream), Some(Input { fifo, keeper })) = (input, stdin) {
            let fifo = copy::register(fifo, Interest::READABLE).map_err(StdioError::Register)?;
            relay.keeper = Mutex::new(Some(keeper));
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
            Output::Pipe(fd) => Sink::Pipe(copy::register(fd, Interest::WRITABLE).map_err(StdioError::Register)?),
            Output::File(file) => Sink::File(file),
        };
        ended.send_modify(|open| *open += 1);
        let (ended, moved) = (Arc::clone(ended), Arc::clone(&self.moved));
        let task = tokio::spawn(async move {
            copy::output(&stream, sink, &moved).await;
            ended.send_modify(|open| *open -= 1);
        });
        self.tasks.push(task.abort_handle());
        Ok(())
    }

    /// Waits until all output has come and is written, or none has moved for `quiet`: somebody may hold the guest's end
    /// open, or nobody read the fifo, for ever.
    pub async fn drain(&self, quiet: Duration) {
        let mut open = self.open.clone();
        loop {
            let before = self.moved.load(Ordering::Relaxed);
            // An error means that all copies are gone.
            if tokio::time::timeout(quiet, open.wait_for(|open| *open == 0)).await.is_ok() {
                return;
            }
            if self.moved.load(Ordering::Relaxed) == before {
                return;
            }
        }
    }

    /// Lets input end when what clients have written is through, and they have closed their ends.
    pub fn close_stdin(&self) {
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(keeper);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}
