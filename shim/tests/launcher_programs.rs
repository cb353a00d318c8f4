//! Programs that fail to start, or whose caller stops waiting, leave no process. This test has a binary of its own,
//! because it looks for zombies among all children of the process.

#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use husk_shim::launcher::{Launcher, ProgramOptions};

async fn check() {
    let launcher = Launcher::start().unwrap();
    let args = ["1000".to_owned()];
    let program = |path| ProgramOptions {
        path: Path::new(path),
        arg0: Some("of-launcher-test"),
        args: &args,
        env: None,
        cwd: None,
        fds: &[],
        cgroup: None,
        kill_on_drop: false,
    };
    for _ in 0..50 {
        assert!(launcher.start_program(&program("/nowhere/x")).await.is_err());
    }
    for _ in 0..20 {
        let options = program("/bin/sleep");
        let start = launcher.start_program(&options);
        // The first poll sends the request. Then the timeout drops the future, unless the answer is already there.
        if let Ok(started) = tokio::time::timeout(Duration::ZERO, start).await {
            started.unwrap().signal(nix::sys::signal::Signal::SIGKILL);
        }
    }
    let left = || {
        std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            let read = |name| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
            let stat = read("stat");
            let mut fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
            let zombie = fields.next() == Some("Z") && fields.next() == Some(&std::process::id().to_string());
            zombie || read("cmdline").contains("of-launcher-test")
        })
    };
    let none_left = async {
        while left() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), none_left).await.expect("a program or a zombie is left");
}

// The main thread runs the test, because the launcher ends with the thread that has started it, and because this process
// must have a single thread when it forks the launcher.
fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(check());
    println!("test programs_that_fail_or_lose_their_caller_leave_no_process ... ok");
}
