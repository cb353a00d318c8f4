//! Tests of requests that end a container while the guest is healthy, but slow. The pod must then run on.
//!
//! The shim, its services and its clients are the real ones. The agent and the VMM process are scripted. The clock is
//! tokio's paused clock, so that timeouts take no time.

use std::sync::atomic::Ordering;
use std::time::Duration;

use husk_proto::containerd::api::Status;
use tokio::time::Instant;

use crate::container::model_tests::{Answer, Model};
use crate::lock;

const MIB: u64 = 1 << 20;

#[tokio::test(start_paused = true)]
async fn delete_leaves_a_slow_agent_time_after_output_that_nobody_reads() {
    let model = Model::start(true).await;
    model.run("other").await;
    let container = model.run("a").await;
    model.attach_silent_output(&container).await;
    model.script.exit("a", 0);
    assert_eq!(model.wait("a").await, 0);
    model.script.set("delete", Answer::Late(Duration::from_millis(3200)));
    assert_eq!(model.delete("a").await.unwrap().exit_status, 0);
    assert_eq!((model.reason(), model.status("other").await), (String::new(), Status::RUNNING));
}

#[tokio::test(start_paused = true)]
async fn container_that_frees_much_memory_may_take_longer_to_exit() {
    let model = Model::start(true).await;
    model.run("a").await;
    model.run("other").await;
    *lock(&model.script.memory) = (1 << 40, 64 * MIB);
    model.script.immortal.store(true, Ordering::Relaxed);
    model.kill("a", libc::SIGKILL).await.unwrap();
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert_eq!((model.reason(), model.status("a").await), (String::new(), Status::RUNNING));
    model.script.exit("a", 137);
    assert_eq!(model.wait("a").await, 137);
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!((model.reason(), model.status("other").await), (String::new(), Status::RUNNING));
}

#[tokio::test(start_paused = true)]
async fn container_that_stops_to_free_memory_ends_the_pod() {
    let model = Model::start(true).await;
    let container = model.run("a").await;
    // The memory is freed after nine queries.
    *lock(&model.script.memory) = (9 * 64 * MIB, 64 * MIB);
    model.script.immortal.store(true, Ordering::Relaxed);
    let begin = Instant::now();
    model.kill("a", libc::SIGKILL).await.unwrap();
    assert_eq!(container.init.wait().await.status, 137);
    let secs = begin.elapsed().as_secs();
    assert_eq!(model.reason(), format!("container a did not exit within {secs} s after SIGKILL"));
    assert_eq!(secs, 13);
}

#[tokio::test(start_paused = true)]
async fn container_that_frees_memory_without_end_ends_the_pod() {
    let model = Model::start(true).await;
    let container = model.run("a").await;
    *lock(&model.script.memory) = (1 << 40, 64 * MIB);
    model.script.immortal.store(true, Ordering::Relaxed);
    model.kill("a", libc::SIGKILL).await.unwrap();
    assert_eq!(container.init.wait().await.status, 137);
    assert_eq!(model.reason(), "container a did not exit within 20 s after SIGKILL");
}

#[tokio::test(start_paused = true)]
async fn agent_that_falls_silent_gets_no_more_time_for_a_container_that_frees_memory() {
    let model = Model::start(true).await;
    model.run("a").await;
    *lock(&model.script.memory) = (1 << 40, 64 * MIB);
    model.script.immortal.store(true, Ordering::Relaxed);
    let begin = Instant::now();
    model.kill("a", libc::SIGKILL).await.unwrap();
    model.script.hang("stats");
    assert_eq!(model.wait("a").await, 137);
    assert!(begin.elapsed() < Duration::from_millis(4500), "{:?}", begin.elapsed());
}
