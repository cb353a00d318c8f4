//! Runs inside a guest, tests the guest's agent over vsock loopback and prints the results. Usage: `guest_test ROOTFS`.
//!
//! Boot a guest whose `/init` starts this program in the background and then executes `husk-agent`. ROOTFS needs
//! busybox in `/bin`.

mod driver;
mod processes;
mod single;
mod spec;

use std::time::{Duration, Instant};

use husk_proto::agent::{EventsRequest, Interface, Neighbour, Route, SetupRequest, event};
use husk_proto::agent_ttrpc::SandboxClient;
use husk_proto::containerd::shim_async::TaskClient;
use husk_proto::{AGENT_PROTOCOL, ports};

use driver::{Driver, Outcome, ctx, dial, timed};

fn main() {
    let rootfs = std::env::args().nth(1).unwrap_or_else(|| "/rootfs".into());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(all(rootfs))) {
        Ok(()) => println!("guest_test: done"),
        Err(error) => println!("guest_test: FAILED {error}"),
    }
}

async fn all(rootfs: String) -> Outcome {
    let started = Instant::now();
    let client = loop {
        match ttrpc::asynchronous::Client::connect("vsock://1:1024").await {
            Ok(client) => break client,
            Err(_) if started.elapsed() < Duration::from_secs(20) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => return Err(error.into()),
        }
    };
    println!("connected to the agent after {:?}", started.elapsed());
    std::thread::spawn(|| {
        let _ = dial(ports::LOG).map(|mut log| std::io::copy(&mut log, &mut std::io::stdout()));
    });
    let sandbox = SandboxClient::new(client.clone());
    let mut events = sandbox.events(ctx(), &EventsRequest::new()).await?;
    tokio::spawn(async move {
        while let Ok(Some(event)) = events.recv().await {
            match event.kind {
                Some(event::Kind::Exit(e)) => {
                    println!(
                        "event: exit {} {:?} pid {} status {} oom {}",
                        e.container_id, e.exec_id, e.pid, e.status, e.oom
                    );
                }
                Some(event::Kind::Oom(e)) => println!("event: oom {}", e.container_id),
                _ => {}
            }
        }
    });
    let mut setup = SetupRequest {
        hostname: "pod".into(),
        entropy: vec![7; 32],
        protocol_version: AGENT_PROTOCOL,
        ..Default::default()
    };
    // If the guest has a network interface (QEMU's user network), the test configures that interface as the pod's
    // interface `pod0`.
    let device = std::fs::read_to_string("/sys/class/net/eth0/address");
    if let Ok(mac) = &device {
        let (name, mac) = ("pod0".to_owned(), mac.trim().to_owned());
        let addresses = vec!["10.0.2.15/24".into(), "fd00::15/64".into()];
        let route = |destination: &str, gateway: &str| {
            let (destination, gateway) = (destination.to_owned(), gateway.to_owned());
            Route { destination, gateway, interface: "pod0".into(), metric: 50, mtu: 1300, ..Default::default() }
        };
        let neighbour = Neighbour {
            address: "10.0.2.99".into(),
            mac: "02:00:00:00:00:99".into(),
            interface: "pod0".into(),
            ..Default::default()
        };
        setup.interfaces = vec![Interface { name, mac, mtu: 1400, addresses, ..Default::default() }];
        setup.routes = vec![
            route("10.0.2.0/24", ""),
            route("fd00::/64", ""),
            route("", "10.0.2.2"),
            route("10.9.0.0/16", ""),
            route("fd01::/64", "fd00::1"),
        ];
        setup.neighbours = vec![neighbour];
        setup.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "0".into());
    }
    let answer = timed("setup", sandbox.setup(ctx(), &setup)).await?;
    println!("kernel {} agent {}", answer.kernel_release, answer.agent_version);
    let driver = Driver { task: TaskClient::new(client), rootfs };
    if device.is_ok() {
        let script =
            "ip a; ip r; ip -6 r; ip n; ping -c 1 -W 5 10.0.2.2; cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
        println!("{}", driver.sh(script).await?.out);
    }
    let mut failed = 0;
    macro_rules! check {
        ($($name:ident),*) => {$(
            let started = Instant::now();
            match driver.$name().await {
                Ok(()) => println!("ok   {} ({:?})", stringify!($name), started.elapsed()),
                Err(error) => { failed += 1; println!("FAIL {}: {error}", stringify!($name)) }
            }
        )*};
    }
    check!(
        prints_output,
        exit_code,
        missing_program,
        missing_program_path,
        non_executable_program,
        stdin,
        large_output,
        terminal,
        exec,
        exec_missing,
        exec_terminal,
        resource_limits,
        oom_kill,
        pause_and_resume,
        pids_and_stats,
        kill,
        unprivileged_user,
        devices,
        readonly_root,
        twenty_containers,
        eight_execs,
        killed_exec,
        seccomp_exec,
        stdout_reopened,
        shared_pids,
        no_leftovers
    );
    println!("guest_test: {failed} failed");
    Ok(())
}
