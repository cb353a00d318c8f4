//! Judges a life after its end.

use std::collections::BTreeSet;
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
use crate::events::Events;
use crate::{containerd, containerd_log, node};

/// Time for everything of the victim to disappear.
const SETTLE: Duration = Duration::from_secs(30);
/// Time for the last events to arrive.
const EVENTS: Duration = Duration::from_secs(15);

/// Time in which a running container writes. It writes twice a second.
const WRITES: Duration = Duration::from_secs(1);

/// Judges a life, and records what is wrong.
pub fn judge(life: &mut Life<'_, '_>) {
    events(life);
    vm_end(life);
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
    for id in victim_ids(life) {
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

/// Returns the ids of the victim's sandboxes and containers. containerd tells no id if its client has disconnected, or if
/// the request has failed. Only the events have these ids. Beside the witness, only the victim has events in a life.
fn victim_ids(life: &Life<'_, '_>) -> BTreeSet<String> {
    let witness = [life.shard.witness.pod.id.as_str(), life.shard.witness.id()];
    let all = life.ended_events.iter().chain([&life.shard.events]).flat_map(Events::ids_so_far);
    let mut ids = new_ids(all, &life.earlier_ids, witness);
    ids.extend(life.victim.ids.iter().cloned());
    ids
}

/// Returns the ids that are neither `earlier` nor the witness's.
fn new_ids(all: impl Iterator<Item = String>, earlier: &BTreeSet<String>, witness: [&str; 2]) -> BTreeSet<String> {
    all.filter(|id| !earlier.contains(id) && !witness.contains(&id.as_str())).collect()
}

/// Reports an end of the VM that the fault does not justify.
fn vm_end(life: &mut Life<'_, '_>) {
    if !life.may_end_pod() {
        let ends = vm_ends(&containerd_log::since(life.log)).into_iter();
        life.findings.extend(ends.map(|reason| format!("the fault must not end the pod, but the VM ended: {reason}")));
    }
}

/// Returns the reasons for the ends of VMs that the shims have logged, except those that a client has requested.
fn vm_ends(log: &str) -> Vec<String> {
    let ends = log.lines().filter(|line| line.contains("msg=\"the VM has ended\"") && line.contains("runtime=husk"));
    let reasons = ends.map(|line| line.split_once(" reason=").map_or(line, |(_, reason)| reason));
    let reasons = reasons.map(|rest| rest.split_once(" runtime=husk").map_or(rest, |(reason, _)| reason));
    reasons.filter(|reason| !reason.contains("a request stopped the sandbox")).map(str::to_owned).collect()
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
    use super::*;

    #[test]
    fn ids_of_a_request_without_an_answer_are_those_of_new_events() {
        let set = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<BTreeSet<_>>();
        let all = ["old", "pod", "witness", "dropped"].map(str::to_owned).into_iter();
        assert_eq!(new_ids(all, &set(&["old"]), ["pod", "witness"]), set(&["dropped"]));
    }

    #[test]
    fn ends_of_vms_are_found_in_the_log() {
        let line = |message: &str, reason: &str| {
            format!("time=\"t\" level=info msg=\"{message}\" reason={reason} runtime=husk namespace=k8s.io sandbox=a\n")
        };
        let killed = "\"container a did not exit within 20 s after SIGKILL\"";
        let log = line("the VM has ended", killed)
            + &line("the VM has ended", "\"a request stopped the sandbox\"")
            + &line("the shim kills the VM", killed);
        assert_eq!(vm_ends(&log), [killed]);
    }

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
