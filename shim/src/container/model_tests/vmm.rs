//! The scripted VMM: answers the shim's calls, and ends when it is killed or when a test says so.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use husk_base::async_fd::register;
use husk_vmm::control::{Answer, Call, Reply, Request, wire};
use tokio::io::Interest;

use super::agent::Script;
use crate::lock;

/// What the VMM does, and what the shim has asked for.
#[derive(Default)]
pub struct Host {
    /// Whether the VMM does not answer.
    hung: AtomicBool,
    /// Whether the VMM refuses all calls.
    refuses: AtomicBool,
    /// Whether the VMM has not always done what it was asked to do.
    pub failed: AtomicBool,
    /// The number of PIDs that were acquired and not released.
    pub pids: AtomicI64,
    /// The vCPUs that the shim has asked for last.
    pub vcpus: AtomicU64,
}

impl Host {
    pub fn hang(&self, hangs: bool) {
        self.failed.store(true, Ordering::Relaxed);
        self.hung.store(hangs, Ordering::Relaxed);
    }

    pub fn refuse(&self, refuses: bool) {
        self.failed.store(true, Ordering::Relaxed);
        self.refuses.store(refuses, Ordering::Relaxed);
    }
}

/// Answers the calls that arrive at `control` until the shim closes the other end.
pub async fn serve(control: OwnedFd, host: Arc<Host>, script: Arc<Script>) {
    let control = register(control, Interest::READABLE).unwrap();
    loop {
        let received = control.async_io(Interest::READABLE, |socket| wire::recv::<Request>(socket)).await;
        let Ok((request, fds)) = received else {
            return;
        };
        if host.hung.load(Ordering::Relaxed) {
            continue;
        }
        let result = match request.call {
            _ if host.refuses.load(Ordering::Relaxed) => Err("no".to_owned()),
            Call::Connect { .. } => {
                let stream = UnixStream::from(fds.into_iter().next().unwrap());
                let script = Arc::clone(&script);
                // The header of the stream arrives after the answer.
                tokio::spawn(accept(stream, script));
                Ok(Answer::Connected)
            }
            Call::AcquirePid => {
                host.pids.fetch_add(1, Ordering::Relaxed);
                Ok(Answer::Pid { pid: 7 })
            }
            Call::ReleasePid { .. } => {
                host.pids.fetch_sub(1, Ordering::Relaxed);
                Ok(Answer::Done)
            }
            Call::AttachMem(_) => Ok(Answer::Attached { slot: 3 }),
            Call::RequestMemory { mib, .. } => Ok(Answer::PluggedMemory { plugged_mib: mib }),
            Call::HotplugVcpus { count } => {
                host.vcpus.store(count.into(), Ordering::Relaxed);
                Ok(Answer::Done)
            }
            _ => Ok(Answer::Done),
        };
        let reply = Reply::Answer { seq: request.seq, result };
        if wire::send(control.get_ref(), &reply, &[]).is_err() {
            return;
        }
    }
}

/// Keeps the guest's end of a stream under the stream's token.
async fn accept(stream: UnixStream, script: Arc<Script>) {
    stream.set_nonblocking(true).unwrap();
    let stream = register(stream, Interest::READABLE).unwrap();
    let mut header = [0; husk_proto::stream::HEADER_LEN];
    let read = stream.async_io(Interest::READABLE, |mut stream| stream.read_exact(&mut header)).await;
    if read.is_ok()
        && let Ok(header) = husk_proto::stream::Header::decode(header)
    {
        lock(&script.streams).insert(header.token.to_string(), stream.into_inner());
    }
}
