//! Tests of the nodes' jobs.

use std::sync::atomic::{AtomicBool, Ordering};

use virtiofsd::fuse::Attr;

use super::*;

/// Returns `count` nodes that the guest has looked up, all of the share's mount.
fn nodes(count: u64) -> Nodes {
    let nodes = Nodes::new(1 << 20, Cache::new(1000));
    (2..2 + count).for_each(|node| look_up(&nodes, node, SHARE));
    nodes
}

fn look_up(nodes: &Nodes, node: Inode, mount: u32) {
    nodes.lock().nodes.insert(node, Node { mount, lookups: 1, file: 0, area: Area::Share });
}

/// Looks up a mount that can be joined, in a directory of the share.
fn look_up_mount(nodes: &Nodes, directory: Inode, name: &str, root: Inode) {
    let name = std::ffi::CString::new(name).unwrap();
    let attr = Attr { ino: root, mode: libc::S_IFDIR, flags: SUBMOUNT, ..Attr::default() };
    let (attr_timeout, entry_timeout) = (Duration::ZERO, Duration::ZERO);
    let mut entry = Entry { inode: root, generation: 0, attr, attr_timeout, entry_timeout };
    assert_eq!(nodes.add(directory, Place::default(), &name, &mut entry), None);
    assert_eq!(entry.inode, root);
}

fn take_inline(nodes: &Nodes, node: Inode) -> Option<Job> {
    nodes.take_job_of_mount(node, &mut SpaceWait::begin())
}

#[test]
fn job_is_queued_once_and_taken_once() {
    let nodes = nodes(2);
    assert_eq!((nodes.queue_forget(2, 3), nodes.queue_forget(2, 4)), (Some(0), None));
    assert_eq!((nodes.queue_forget(3, 0), nodes.queue_forget(99, 1)), (None, None));
    let job = take_inline(&nodes, 3).unwrap();
    assert_eq!((job.node, job.count), (2, 7));
    assert!(nodes.take_job(0).is_none() && take_inline(&nodes, 3).is_none());
    nodes.end_job(&job);
    assert!(nodes.lock().jobs.is_empty());
    nodes.wait_for_jobs(2, &SpaceWait::begin());
}

#[test]
fn workers_queue_does_not_grow_when_requests_run_the_jobs() {
    let nodes = nodes(0);
    let mut calls = 0;
    for node in 2..100 {
        look_up(&nodes, node, SHARE);
        calls += usize::from(nodes.queue_forget(node, 1).is_some());
        match node % 3 {
            0 => nodes.end_job(&take_inline(&nodes, node).unwrap()),
            1 => assert!(nodes.forget(node, 1).unwrap().is_last),
            _ => nodes.clear(),
        }
        assert_eq!((nodes.lock().forgotten.len(), calls), (0, 1));
    }
    assert!(nodes.take_job(0).is_none());
    assert!(nodes.lock().jobs.is_empty());
}

#[test]
fn job_stays_with_the_mount_for_which_it_was_queued() {
    let nodes = nodes(1);
    assert_eq!(nodes.queue_forget(2, 1), Some(0));
    look_up(&nodes, 2, 7);
    assert_eq!(nodes.queue_forget(2, 1), None);
    let job = nodes.take_job(0).unwrap();
    assert_eq!((job.node, job.count), (2, 2));
    nodes.end_job(&job);
    assert!(nodes.lock().jobs.is_empty());
}

#[test]
fn node_without_a_name_is_in_the_group_of_its_directory() {
    let nodes = nodes(1);
    nodes.lock().nodes.insert(9, Node { mount: 7, lookups: 1, file: 0, area: Area::Share });
    nodes.add_unnamed(9, 1 << 63);
    nodes.add_unnamed(2, 1 << 63 | 1);
    assert_eq!((nodes.group(1 << 63), nodes.group(1 << 63 | 1)), (7, 0));
    assert_eq!(nodes.queue_forget(1 << 63, 1), Some(7));
    assert!(nodes.forget(1 << 63, 1).unwrap().is_last);
}

#[test]
fn request_waits_for_a_running_job() {
    let nodes = nodes(2);
    nodes.queue_forget(2, 1);
    let job = nodes.take_job(0).unwrap();
    // The job does not end.
    let wait = SpaceWait { end: Instant::now() + Duration::from_millis(20), jobs: 0 };
    nodes.wait_for_jobs(3, &wait);
    assert!(Instant::now() >= wait.end);
    // The job ends, and is so new that it does not hang during the test.
    let wait = SpaceWait { end: Instant::now() + Duration::from_secs(3600), jobs: 0 };
    *nodes.lock().jobs.get_mut(&SHARE).unwrap().running.get_mut(&job.number).unwrap() = wait.end;
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            nodes.wait_for_jobs(3, &wait);
            assert!(ended.load(Ordering::SeqCst));
        });
        ended.store(true, Ordering::SeqCst);
        nodes.end_job(&job);
    });
}

#[test]
fn request_waits_neither_for_many_jobs_nor_for_a_job_that_hangs() {
    let now = Instant::now();
    let wait = SpaceWait { end: now + FREE_TIMEOUT, jobs: 0 };
    let jobs = |queued: usize, ages: &[Duration]| Jobs {
        queued: (0..queued as u64).collect(),
        calls: 0,
        running: (0..).zip(ages.iter().map(|&age| now.checked_sub(age).unwrap())).collect(),
    };
    let half = FREE_TIMEOUT / 2;
    assert_eq!(jobs(0, &[]).awaited_until(&wait, now), None);
    assert_eq!(jobs(MAX_AWAITED_JOBS, &[half]).awaited_until(&wait, now), Some(now + half));
    assert_eq!(jobs(MAX_AWAITED_JOBS + 1, &[half]).awaited_until(&wait, now), None);
    assert_eq!(jobs(0, &[FREE_TIMEOUT, half]).awaited_until(&wait, now), Some(now + half));
    assert_eq!(jobs(0, &[FREE_TIMEOUT]).awaited_until(&wait, now), None);
    // However many jobs follow each other, the request waits for a limited time.
    assert_eq!(jobs(0, &[Duration::ZERO]).awaited_until(&SpaceWait { end: now, jobs: 0 }, now), None);
}

#[test]
fn request_runs_a_limited_number_of_jobs_and_none_while_one_hangs() {
    let nodes = nodes(200);
    let mut wait = SpaceWait { end: Instant::now() + Duration::from_secs(3600), jobs: MAX_AWAITED_JOBS };
    for node in 2..2 + MAX_AWAITED_JOBS as u64 {
        nodes.queue_forget(node, 1);
        nodes.end_job(&nodes.take_job_of_mount(node, &mut wait).unwrap());
    }
    nodes.queue_forget(100, 1);
    assert!(nodes.take_job_of_mount(100, &mut wait).is_none());
    let hangs = take_inline(&nodes, 100).unwrap();
    nodes.queue_forget(101, 1);
    let began = Instant::now().checked_sub(FREE_TIMEOUT).unwrap();
    *nodes.lock().jobs.get_mut(&SHARE).unwrap().running.get_mut(&hangs.number).unwrap() = began;
    assert!(take_inline(&nodes, 101).is_none());
    nodes.end_job(&hangs);
    let job = take_inline(&nodes, 101).unwrap();
    nodes.end_job(&job);
    for node in 102..102 + MAX_AWAITED_JOBS as u64 + 1 {
        nodes.queue_forget(node, 1);
    }
    assert!(take_inline(&nodes, 102).is_none());
}

#[test]
fn mount_keeps_its_number_if_its_directory_is_forgotten() {
    let nodes = nodes(0);
    for directory in 2..100 {
        look_up(&nodes, directory, SHARE);
        look_up_mount(&nodes, directory, "0-wg.volume", 1000);
        assert_eq!(nodes.forget(directory, 1).unwrap().references, [Surplus { inner: directory, count: 1 }]);
    }
    assert_eq!((nodes.group(1000), nodes.lock().last_mount), (1, 1));
    assert!(!nodes.joined.load(Ordering::Acquire));
    // The second mount joins. A guest cannot drop more references than it has.
    look_up(&nodes, 2, SHARE);
    look_up_mount(&nodes, 2, "1-wg.part", 1001);
    assert_eq!(nodes.forget(1000, u64::MAX).unwrap().references, [Surplus { inner: 1000, count: 98 }]);
    assert_eq!(nodes.forget(1001, 1).unwrap().references, [Surplus { inner: 1001, count: 1 }]);
    look_up_mount(&nodes, 2, "0-wg.volume", 1002);
    assert_eq!(nodes.group(1002), 3);
}
