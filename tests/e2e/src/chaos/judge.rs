//! Judges a life after its end.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};

use super::census::Census;
use super::grammar;
use super::life::Life;
use super::targets;
use super::victim::Writer;
use crate::{containerd, node};

/// Time for everything of the victim to disappear.
const SETTLE: Duration = Duration::from_secs(30);
/// Time for the last events to arrive.
const EVENTS: Duration = Duration::from_secs(15);

/// Time in which a running container writes. It writes twice a second.
const WRITES: Duration = Duration::from_secs(1);

/// Judges a life, and records what is wrong.
pub fn judge(life: &mut Life<'_, '_>) {
    events(life);
    life.shard.files.empty();
    life.victim.clean_up_cgroup();
    census(life);
    // A container that still runs writes within this time.
    let last = life.victim.writers.iter().filter_map(Writer::ended).max();
    if let Some(rest) = last.and_then(|ended| WRITES.checked_sub(ended.elapsed())) {
        thread::sleep(rest);
    }
    let writers = life.victim.writers.iter().filter_map(Writer::judge);
    life.findings.extend(writers);
    life.findings.extend(life.shard.witness.judge());
}

fn events(life: &mut Life<'_, '_>) {
    for id in life.victim.ids.clone() {
        let mut wrong = Ok(());
        node::eventually(EVENTS, || {
            let mut events: Vec<String> = life.ended_events.iter().flat_map(|events| events.so_far(&id)).collect();
            events.extend(life.shard.events.for_container(&id));
            wrong = grammar::check(&events, life.disturbed);
            wrong.is_ok().then_some(())
        });
        if let Err(wrong) = wrong {
            life.findings.push(format!("events of {id}: {wrong}"));
        }
    }
}

fn census(life: &mut Life<'_, '_>) {
    let excused = life.restarts_containerd();
    let mut left = Vec::new();
    node::eventually(SETTLE, || {
        // The kubelet removes the pod's parent cgroup when it is empty.
        life.victim.clean_up_cgroup();
        left = Census::take().left_since(&life.shard.base);
        if excused {
            left.retain(|thing| !is_containerds(thing));
        }
        left.is_empty().then_some(())
    });
    if !left.is_empty() {
        life.findings.push(format!("left on the node: {}", left.join("; ")));
    }
    if excused {
        sweep(life);
        life.shard.rebase();
    }
}

/// Returns whether containerd itself leaves this if it is killed in a request. containerd makes a network namespace and
/// a snapshot before it records the sandbox to which they belong.
fn is_containerds(thing: &str) -> bool {
    ["path /run/netns/", "mount /run/netns/", "interface veth", "containerd still has the container"]
        .iter()
        .any(|prefix| thing.starts_with(prefix))
        || thing.contains("io.containerd.grpc.v1.cri/")
}

/// Removes what containerd itself has left. The next lives would count it.
fn sweep(life: &Life<'_, '_>) {
    for path in targets::network_namespaces() {
        if !life.shard.namespaces.contains(&path) {
            let _ = umount2(&path, MntFlags::MNT_DETACH);
            let _ = fs::remove_file(path);
        }
    }
    let witness = &life.shard.witness;
    for id in containerd::containers(crate::KUBERNETES).unwrap_or_default() {
        if id != witness.pod.id && id != witness.id() {
            let _ = umount2(
                Path::new(&format!("/run/containerd/io.containerd.grpc.v1.cri/sandboxes/{id}/shm")),
                MntFlags::MNT_DETACH,
            );
            let _ = containerd::delete_container(crate::KUBERNETES, &id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_containerds;

    #[test]
    fn what_containerd_itself_leaves_is_known() {
        assert!(is_containerds("path /run/netns/cni-1"));
        assert!(is_containerds("mount /run/containerd/io.containerd.grpc.v1.cri/sandboxes/a/shm"));
        for thing in ["process 7 (husk-vmm)", "path /run/husk/a", "containerd still has the task a", "2 taps, 1 before"]
        {
            assert!(!is_containerds(thing), "{thing}");
        }
    }
}
