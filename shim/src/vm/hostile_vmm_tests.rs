//! Tests of the shim's calls with VMMs that violate the protocol of the control socket.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::{Duration, Instant};

use husk_base::sys::resource;
use husk_config::TimeoutFactor;
use husk_vmm::control::{BootStep, ExitReason, PageKind};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::time::TimeValLike;
use nix::time::ClockId;

use super::*;

/// Maximum number of packets that the shim may read in one burst and in the time `elapsed`, if each packet counts at
/// least `bytes`. The last read of a burst may exceed the limit once.
fn allowed(bytes: usize, elapsed: Duration) -> usize {
    let (burst, rate, reads) = (4 << 20, f64::from(1 << 20), 2);
    (burst + (rate * elapsed.as_secs_f64()) as usize) / bytes + reads
}

/// The VMM's end of the control socket.
#[derive(Clone)]
struct HostileVmm {
    control: Arc<OwnedFd>,
    /// Number of packets that the VMM has sent in a flood.
    sent: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
}

impl HostileVmm {
    /// Returns the shim's client and the VMM's end of its control socket. A task handles the notices, as in the shim.
    fn start() -> (Vmm, Self) {
        let (ours, theirs) = wire::pair().unwrap();
        husk_base::sys::fd::set_nonblocking(&ours).unwrap();
        let (notify, mut notices) = mpsc::channel(64);
        tokio::spawn(async move { while notices.recv().await.is_some() {} });
        let vmm = Vmm::over(ours, notify).unwrap();
        (vmm, Self { control: Arc::new(theirs), sent: Arc::default(), over: Arc::default() })
    }

    /// Makes the shim's socket accept fds, as it does on kernels that do not have SO_PASSRIGHTS.
    fn accept_fds_as_on_older_kernels(vmm: &Vmm) {
        let _ = scm_rights::accept_fds(vmm.inner.control.get_ref(), true);
    }

    /// Sends a packet. Waits while the socket is full. Returns whether the packet was sent.
    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        scm_rights::send(&*self.control, bytes, fds).is_ok()
    }

    fn reply(&self, reply: &Reply) {
        wire::send(&*self.control, reply, &[]).unwrap();
    }

    fn answer(&self, seq: u64, answer: Answer) {
        self.reply(&Reply::Answer { seq, result: Ok(answer) });
    }

    /// Waits for the next request, and returns its sequence number.
    fn request(&self) -> u64 {
        wire::recv::<Request>(&*self.control).unwrap().0.seq
    }

    /// Starts a thread that sends packets without a pause, until [`Self::end`] or until the shim has closed its socket.
    fn flood(&self, packets: Vec<Vec<u8>>, fds: Vec<OwnedFd>) -> std::thread::JoinHandle<()> {
        let vmm = self.clone();
        std::thread::spawn(move || {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let sending = || !vmm.over.load(Ordering::Relaxed);
            for _ in packets.iter().cycle().take_while(|packet| sending() && vmm.send(packet, &fds)) {
                vmm.sent.fetch_add(1, Ordering::Relaxed);
            }
        })
    }

    fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

fn notices() -> Vec<Vec<u8>> {
    [
        Notice::FdShortage,
        Notice::VhostRequested { mac: [2; 6] },
        Notice::BootStep { step: BootStep::AgentReady, at_ns: 0 },
        Notice::Exited { reason: ExitReason::Reset },
    ]
    .into_iter()
    .map(|notice| serde_json::to_vec(&Reply::Notice(notice)).unwrap())
    .collect()
}

/// CPU time of this thread, which runs all tasks of the shim.
fn cpu_time() -> Duration {
    let time = ClockId::CLOCK_THREAD_CPUTIME_ID.now().unwrap();
    Duration::from_nanos(time.num_nanoseconds() as u64)
}

#[tokio::test]
async fn vmm_that_sends_packets_without_end_has_to_wait_for_the_shim() {
    let oversized = vec![b' '; wire::MAX_MESSAGE + 1];
    let answer = br#"{"Answer":{"seq":7,"result":{"Ok":"Done"}}}"#.to_vec();
    let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let many_fds = || (0..253).map(|_| file()).collect::<Vec<_>>();
    let start = Instant::now();
    let floods = [
        ("notices", notices(), vec![], PACKET_BYTES),
        ("answers to unknown calls", vec![answer.clone()], vec![], PACKET_BYTES),
        ("answers with fds", vec![answer], many_fds(), PACKET_BYTES + FDS_BYTES),
        ("unknown messages", vec![b"{\"Answer\":7}".to_vec(), vec![0xff; 9]], vec![], PACKET_BYTES),
        ("packets that are too long", vec![oversized], vec![], PACKET_BYTES + wire::MAX_MESSAGE),
    ]
    .map(|(what, packets, fds, bytes)| {
        let (vmm, hostile) = HostileVmm::start();
        HostileVmm::accept_fds_as_on_older_kernels(&vmm);
        let thread = hostile.flood(packets, fds);
        (what, bytes, vmm, hostile, thread)
    });
    tokio::time::sleep(Duration::from_secs(2)).await;
    // The bursts are over. From here on, the shim mostly waits, and reads what the rate allows.
    let (cpu_before, wait) = (cpu_time(), Instant::now());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (cpu, waited) = (cpu_time().saturating_sub(cpu_before), wait.elapsed());
    println!("the shim used {cpu:?} of CPU time in {waited:?}, with {} floods at the same time", floods.len());
    floods.iter().for_each(|(.., hostile, _)| hostile.end());
    for (what, bytes, vmm, hostile, thread) in floods {
        tokio::task::spawn_blocking(|| thread.join().unwrap()).await.unwrap();
        // Up to 512 packets may wait in the socket (net.unix.max_dgram_qlen).
        let limit = allowed(bytes, start.elapsed()) + 512;
        let sent = hostile.sent.load(Ordering::Relaxed);
        assert!(sent > 0 && sent <= limit, "the shim read {sent} {what}; the limit is {limit}");
        println!("the shim read {sent} {what}; the limit is {limit}");
        drop(vmm);
    }
    assert!(cpu < waited / 2, "the shim used {cpu:?} of CPU time in {waited:?}; the limit is half of this time");
}

#[tokio::test]
async fn calls_get_their_answers_while_notices_and_unknown_messages_arrive() {
    let (vmm, hostile) = HostileVmm::start();
    let packets = [notices(), vec![b"garbage".to_vec(), vec![b' '; wire::MAX_MESSAGE + 1]]].concat();
    let flood = hostile.flood(packets, vec![]);
    let serving = hostile.clone();
    std::thread::spawn(move || {
        while let Ok((request, _)) = wire::recv::<Request>(&*serving.control) {
            serving.answer(request.seq, Answer::Done);
        }
    });
    let mut answers = 0;
    while answers < 20 || hostile.sent.load(Ordering::Relaxed) < 1000 {
        assert!(matches!(vmm.call(Call::AcquirePid, &[]).await, Ok(Answer::Done)));
        answers += 1;
    }
    hostile.end();
    tokio::task::spawn_blocking(|| flood.join().unwrap()).await.unwrap();
}

#[tokio::test]
async fn answers_with_wrong_sequence_numbers_do_not_answer_a_call() {
    let (vmm, hostile) = HostileVmm::start();
    std::thread::spawn(move || {
        let seq = hostile.request();
        for wrong in [0, seq + 1, seq + 2, u64::MAX] {
            hostile.answer(wrong, Answer::NotFound);
        }
        hostile.answer(seq, Answer::Attached { slot: 7 });
        // The second answer to the same call.
        hostile.answer(seq, Answer::NotFound);
        hostile.answer(hostile.request(), Answer::Done);
    });
    let found = vmm.call(Call::FindNet([2; 6]), &[]).await;
    assert!(matches!(found, Ok(Answer::Attached { slot: 7 })), "{found:?}");
    assert!(matches!(vmm.call(Call::Detach { slot: 7 }, &[]).await, Ok(Answer::Done)));
}

/// Returns the number of open fds of this process that refer to the pipe of `end`.
fn copies(end: &impl AsRawFd) -> usize {
    let target = |path: PathBuf| std::fs::read_link(path).ok();
    let pipe = target(format!("/proc/self/fd/{}", end.as_raw_fd()).into()).unwrap();
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    fds.filter(|fd| target(fd.path()).as_deref() == Some(&pipe)).count()
}

#[tokio::test]
async fn shim_gets_no_fd_of_the_vmm_and_the_call_ends() {
    let answer = |seq| serde_json::to_vec(&Reply::Answer { seq, result: Ok(Answer::NotFound) }).unwrap();
    let packets = [notices(), vec![answer(u64::MAX), b"garbage".to_vec(), vec![]]].concat();
    let (vmm, hostile) = HostileVmm::start();
    HostileVmm::accept_fds_as_on_older_kernels(&vmm);
    let (mut reader, writer) = std::io::pipe().unwrap();
    assert_eq!(copies(&reader), 2);
    std::thread::spawn(move || {
        let fds = [writer.as_fd(); wire::MAX_FDS + 8];
        for count in [1, wire::MAX_FDS, fds.len()] {
            for packet in &packets {
                assert!(hostile.send(packet, &fds[..count]));
            }
            assert!(hostile.send(&answer(hostile.request()), &fds[..count]));
        }
        hostile
    });
    for _ in 0..3 {
        let found = vmm.call(Call::FindNet([2; 6]), &[]).await;
        assert!(matches!(found, Ok(Answer::NotFound)), "{found:?}");
    }
    // The reader sees the end of the pipe only if every copy of the writer is closed.
    let end = tokio::task::spawn_blocking(move || (reader.read(&mut [0]).unwrap(), copies(&reader)));
    assert_eq!(end.await.unwrap(), (0, 1));
}

/// close(2) can block, because it flushes the file. It also drops the process's locks of the file, even if the process
/// has another fd of the file. Therefore, a lock shows whether the shim has closed an fd.
#[tokio::test]
async fn shim_does_not_call_close_for_an_fd_of_the_vmm() {
    let (vmm, hostile) = HostileVmm::start();
    HostileVmm::accept_fds_as_on_older_kernels(&vmm);
    let file = Arc::new(tempfile::tempfile().unwrap());
    // SAFETY: all bytes of the structure may be zero.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as i16;
    fcntl(&*file, FcntlArg::F_SETLK(&lock)).unwrap();
    let other = std::fs::File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    lock.l_type = libc::F_RDLCK as i16;
    let sent = Arc::clone(&file);
    let serving = std::thread::spawn(move || {
        let answer = serde_json::to_vec(&Reply::Answer { seq: hostile.request(), result: Ok(Answer::Done) }).unwrap();
        assert!(hostile.send(b"garbage", &[sent.as_fd()]) && hostile.send(&answer, &[sent.as_fd()]));
        hostile
    });
    assert!(matches!(vmm.call(Call::Resume, &[]).await, Ok(Answer::Done)));
    assert_eq!(fcntl(&other, FcntlArg::F_OFD_SETLK(&lock)), Err(Errno::EAGAIN), "the shim has closed an fd of the VMM");
    drop((serving, file));
}

#[tokio::test]
async fn kernel_refuses_fds_for_the_shim() {
    let (vmm, hostile) = HostileVmm::start();
    if scm_rights::accept_fds(vmm.inner.control.get_ref(), false).is_err() {
        println!("the kernel does not have SO_PASSRIGHTS");
        return;
    }
    let refuses = |socket: BorrowedFd<'_>| {
        let error = scm_rights::send(socket, b"x", &[socket]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    };
    refuses(hostile.control.as_fd());
    let serving = std::thread::spawn(move || {
        let (request, mut fds) = wire::recv::<Request>(&*hostile.control).unwrap();
        hostile.answer(request.seq, Answer::Connected);
        fds.remove(0)
    });
    let _stream = vmm.connect(1024).await.unwrap();
    refuses(serving.join().unwrap().as_fd());
}

/// The test lowers the fd limit. Therefore, it runs in a process of its own.
#[tokio::test]
async fn shim_without_free_fds_fails_a_connection_at_once_and_loses_no_answer() {
    const NAME: &str =
        "vm::vmm::hostile_vmm_tests::shim_without_free_fds_fails_a_connection_at_once_and_loses_no_answer";
    const VARIABLE: &str = "HUSK_TEST_WITHOUT_FREE_FDS";
    if std::env::var_os(VARIABLE).is_none() {
        let test = std::env::current_exe().unwrap();
        let output = Command::new(test).args(["--exact", NAME]).env(VARIABLE, "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    let (vmm, hostile) = HostileVmm::start();
    std::thread::spawn(move || {
        loop {
            hostile.answer(hostile.request(), Answer::Connected);
        }
    });
    assert!(matches!(vmm.call(Call::AcquirePid, &[]).await, Ok(Answer::Connected)));
    let set = |limit| resource::limit(nix::unistd::getpid(), libc::RLIMIT_NOFILE, limit).unwrap();
    let before = set(None);
    set(Some(resource::Limit { soft: 0, ..before }));
    let (connected, answer) = (vmm.connect(1024).await, vmm.call(Call::AcquirePid, &[]).await);
    set(Some(before));
    let error = connected.unwrap_err();
    assert!(matches!(&error, VmmError::Socket(source) if source.raw_os_error() == Some(libc::EMFILE)), "{error:?}");
    assert_eq!(error.to_string(), "failed to create a socket pair for a connection to the guest");
    assert!(matches!(answer, Ok(Answer::Connected)), "{answer:?}");
    assert!(vmm.connect(1024).await.is_ok());
}

#[tokio::test]
async fn connect_gives_the_vmm_one_end_of_a_socket_pair() {
    let (vmm, hostile) = HostileVmm::start();
    let serving = std::thread::spawn(move || {
        let (request, mut fds) = wire::recv::<Request>(&*hostile.control).unwrap();
        assert!(matches!(request.call, Call::Connect { port: 1024 }) && fds.len() == 1);
        hostile.answer(request.seq, Answer::Connected);
        let mut stream = UnixStream::from(fds.remove(0));
        stream.write_all(b"hello").unwrap();
        hostile.answer(hostile.request(), Answer::Done);
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        rest
    });
    let mut stream = vmm.connect(1024).await.unwrap();
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
    assert!(matches!(vmm.connect(1024).await, Err(VmmError::Unexpected)));
    stream.write_all(b"bye").unwrap();
    // The VMM sees the end of the stream only if the shim has no other copy of the socket.
    drop(stream);
    assert_eq!(tokio::task::spawn_blocking(|| serving.join().unwrap()).await.unwrap(), "bye");
}

#[tokio::test]
async fn vmm_that_closes_its_socket_is_killed() {
    let mut child = Command::new("sleep").arg("infinity").spawn().unwrap();
    let pidfd = husk_base::sys::pidfd::open(child.id().cast_signed()).unwrap();
    let (control, theirs) = wire::pair().unwrap();
    let (notify, _notices) = mpsc::channel(64);
    let vmm = Vmm::attach(Spawned { pid: child.id(), pidfd, control }, notify, TimeoutFactor::default()).unwrap();
    drop(theirs);
    assert_eq!(vmm.wait().await.signal(), Some(libc::SIGKILL));
    assert!(child.wait().is_err(), "the shim did not reap the process");
}

#[tokio::test]
async fn packet_without_bytes_ends_all_calls() {
    let (vmm, hostile) = HostileVmm::start();
    let thread = std::thread::spawn(move || {
        hostile.request();
        assert!(hostile.send(&[], &[]));
        hostile
    });
    assert!(matches!(vmm.call(Call::Resume, &[]).await, Err(VmmError::Gone)));
    assert!(matches!(vmm.call(Call::Resume, &[]).await, Err(VmmError::Gone)));
    drop(thread);
}

#[tokio::test(start_paused = true)]
async fn call_ends_after_its_timeout_if_the_vmm_does_not_answer() {
    let (vmm, _hostile) = HostileVmm::start();
    for port in 0..10 {
        assert!(matches!(vmm.connect(port).await, Err(VmmError::Timeout { request: "Connect", .. })));
    }
    let slow = [Call::Resume, Call::RequestMemory { pages: PageKind::Ordinary, mib: 1 }];
    for (call, name) in slow.into_iter().zip(["Resume", "RequestMemory"]) {
        let start = tokio::time::Instant::now();
        let error = vmm.call(call, &[]).await.unwrap_err();
        assert_eq!(start.elapsed().as_secs(), SLOW_ANSWER_TIMEOUT.as_secs());
        assert_eq!(error.to_string(), format!("the VMM did not answer the request {name} within 3600 s"));
    }
    let waiting = lock(&vmm.inner.pending).as_ref().map(HashMap::len);
    assert_eq!(waiting, Some(0), "calls without an answer are kept after their timeout");
    // The VMM does not read the requests. Therefore, the socket becomes full.
    let calls = (0..600).map(|_| vmm.call(Call::AcquirePid, &[]));
    for call in calls {
        assert!(matches!(call.await, Err(VmmError::Timeout { request: "AcquirePid", .. })));
    }
}

#[tokio::test]
async fn huge_errors_of_the_vmm_are_shortened() {
    let (vmm, hostile) = HostileVmm::start();
    std::thread::spawn(move || {
        let error = "x\n\x1b".repeat(7000);
        hostile.reply(&Reply::Answer { seq: hostile.request(), result: Err(error) });
    });
    let error = vmm.call(Call::Resume, &[]).await.unwrap_err();
    let text = crate::chain(&error);
    assert!(
        text.len() < 50_000 && !text.contains('\x1b'),
        "the error has {} bytes (the limit is 50000), or contains an escape character",
        text.len()
    );
}
