//! Fuzzes the packets that a VMM sends to the shim, while the shim's calls wait for answers.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use husk_base::sys::scm_rights;
use husk_shim::vm::vmm::Vmm;
use husk_vmm::control::{Answer, BootStep, Call, ExitReason, Notice, Reply, wire};
use tokio::sync::mpsc;

use crate::driver::memory_file;
use crate::input::input;
use crate::runtime::block_on;

#[derive(arbitrary::Arbitrary, Debug)]
enum Packet {
    Answer { seq: u8, answer: u8, number: u64, fds: u8 },
    Refusal { seq: u8, text: String },
    Notice { which: u8, number: u64, mac: [u8; 6], text: String },
    Raw { bytes: Vec<u8>, fds: u8 },
}

impl Packet {
    fn encode(&self) -> Vec<u8> {
        let reply = match self {
            Packet::Raw { bytes, .. } => return bytes.clone(),
            Packet::Refusal { seq, text } => Reply::Answer { seq: (*seq).into(), result: Err(text.clone()) },
            Packet::Answer { seq, answer, number, .. } => {
                let answer = match answer % 7 {
                    0 => Answer::Done,
                    1 => Answer::Created { unrestricted: None, refused: None },
                    2 => Answer::NotFound,
                    3 => Answer::Connected,
                    4 => Answer::PluggedMemory { plugged_mib: *number },
                    5 => Answer::Pid { pid: *number as u32 },
                    _ => Answer::Attached { slot: *number as u32 },
                };
                Reply::Answer { seq: u64::from(*seq % 8), result: Ok(answer) }
            }
            Packet::Notice { which, number, mac, text } => Reply::Notice(match which % 6 {
                0 => Notice::FdShortage,
                1 => Notice::VhostRequested { mac: *mac },
                2 => Notice::BootStep { step: BootStep::AgentReady, at_ns: *number },
                3 => Notice::Terminated,
                4 => Notice::Exited { reason: ExitReason::Failed(text.clone()) },
                _ => Notice::Exited { reason: ExitReason::Reset },
            }),
        };
        serde_json::to_vec(&reply).expect("encode a reply")
    }

    fn fds(&self) -> usize {
        match self {
            Packet::Answer { fds, .. } | Packet::Raw { fds, .. } => usize::from(*fds % 4),
            Packet::Refusal { .. } | Packet::Notice { .. } => 0,
        }
    }
}

fn set_nonblocking(fd: &OwnedFd) {
    husk_base::sys::fd::set_nonblocking(fd).expect("set non-blocking mode");
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(packets) = input::<Vec<Packet>>(bytes) else { return };
    block_on(async {
        let (ours, theirs) = wire::pair().expect("create a socket pair");
        set_nonblocking(&ours);
        set_nonblocking(&theirs);
        let (sender, mut notices) = mpsc::channel(64);
        let vmm = Vmm::over(ours, sender).expect("create the shim's VMM client");
        let file = memory_file(0);
        let answer = async {
            // `join!` polls the four calls below before this future. Therefore, each call already waits for its answer.
            for packet in packets.iter().take(32) {
                let fds: Vec<BorrowedFd<'_>> = (0..packet.fds()).map(|_| file.as_fd()).collect();
                let bytes = packet.encode();
                // Since Linux 6.16, the kernel refuses a packet with fds, because the shim's socket accepts none.
                if scm_rights::send(&theirs, &bytes, &fds).is_err() {
                    let _ = scm_rights::send(&theirs, &bytes, &[]);
                }
                tokio::task::yield_now().await;
            }
            drop(theirs);
        };
        let (done, pid, connected, attached, ()) = tokio::join!(
            vmm.call(Call::Resume, &[]),
            vmm.acquire_pid(),
            vmm.connect(1024),
            vmm.call(Call::FindNet([2, 0, 0, 0, 0, 1]), &[]),
            answer
        );
        if let Ok(pid) = pid {
            // `Vmm::over` uses the PID of this process as the VMM's PID.
            assert!(
                std::path::Path::new(&format!("/proc/self/task/{pid}")).exists(),
                "the PID {pid} is not a thread of the VMM"
            );
        }
        drop((done, connected, attached));
        while notices.recv().await.is_some() {}
    });
}
