//! Tests [`prepare`] with real mounts. Each test has its own mount namespace. The tests need root privileges.

mod attributes;
mod host_only;
mod host_view;
mod later_mounts;
mod rootfs;
mod volumes;
mod ways;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use husk_proto::volume;
use serde_json::{Value, json};

use super::prepare::*;
use crate::host_view::HostView;
use crate::oci::Bundle;
use crate::oci::bundle::tests::sample;
use crate::volumes::test_support::{isolated, shared_mount, tmpfs};
use crate::volumes::*;

fn mounts_below(dir: &Path) -> Vec<String> {
    // Read the mount list of this thread, because the main thread is in a different mount namespace.
    let text = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let dir = dir.to_str().unwrap();
    text.lines().filter_map(|line| line.split(' ').nth(4)).filter(|at| at.starts_with(dir)).map(Into::into).collect()
}

fn overlay(dir: &Path, layers: usize) -> RootMount {
    let make = |name: &str| {
        let path = dir.join("snapshots-with-a-name-as-long-as-that-of-containerds-own-snapshotter").join(name);
        fs::create_dir_all(&path).unwrap();
        path.to_str().unwrap().to_string()
    };
    let lower: Vec<String> = (0..layers).map(|n| make(&format!("{n}/fs"))).collect();
    fs::write(Path::new(&lower[layers - 1]).join("from-the-lowest"), "x").unwrap();
    let options = vec![
        format!("workdir={}", make("work")),
        format!("upperdir={}", make("upper")),
        format!("lowerdir={}", lower.join(":")),
    ];
    RootMount { kind: "overlay".into(), source: "overlay".into(), target: String::new(), options }
}

fn bundle(dir: &Path, change: impl FnOnce(&mut Value)) -> Bundle {
    let mut value = sample();
    change(&mut value);
    fs::write(dir.join("config.json"), value.to_string()).unwrap();
    Bundle::read(dir).unwrap()
}

/// Returns the source of mount `index` in `prepared.spec`, as a host path below `share.guest`. If the guest binds a part
/// of a mount in the share, returns the path of this part.
fn guest_source(share: &Share, prepared: &Prepared, index: usize) -> PathBuf {
    let path = Path::new(prepared.spec["mounts"][index]["source"].as_str().unwrap());
    let part = prepared.volumes.memory.iter().find(|request| volume::guest_path(request) == path);
    let names = part.iter().flat_map(|part| part.directories.iter().map(|directory| &directory.name));
    let root = part.map_or_else(|| path.to_owned(), volume::root_path);
    let root = share.guest.join(root.strip_prefix(husk_proto::GUEST_SHARE).unwrap());
    names.fold(root, |path, name| path.join(name))
}

/// Returns the number of entries in the share's root and in the directory of volumes.
fn entries_in_share(share: &Share) -> usize {
    let count = |path: &Path| fs::read_dir(path).unwrap().count();
    // Subtract 1 for the directory of volumes, because only its entries count.
    count(&share.host) - 1 + count(&share.host.join(shared_mounts::VOLUMES))
}

/// Returns the number of mount trees in the staging directory.
fn staged_trees(share: &Share) -> usize {
    let stage = staging_dir::StagingDir::for_share(&share.host);
    ["receiving", "copying"].map(|name| fs::read_dir(stage.dir().join(name)).unwrap().count()).iter().sum()
}

/// Updates the mounts in all shared volumes. Returns the first error.
fn sync_mounts(share: &Path) -> Result<(), propagate::SyncError> {
    let results: Vec<_> = propagate::volumes(share)?.iter().map(|name| propagate::update(share, name)).collect();
    results.into_iter().collect()
}

fn share(dir: &Path) -> Share {
    let sandbox = dir.join("sandbox");
    fs::create_dir(&sandbox).unwrap();
    Share::mount(&sandbox).unwrap()
}

/// Prepares a container that is allowed no socket of the node, and that shares no PID namespace.
fn prepare_from(bundle: &Bundle, id: &str, share: &Path, rootfs: &[RootMount]) -> Result<Prepared, PrepareError> {
    let (host, pids) = (HostView::own(), HashMap::new());
    prepare(bundle, &Request { id, share, rootfs, host: &host, host_sockets: &[], pids: &pids })
}

/// Prepares container `c1` with a volume whose source is `root`. Returns the volume's path below `share.guest`.
fn prepare_volume(dir: &Path, share: &Share, root: &Path, options: &[&str]) -> PathBuf {
    prepare_volume_for("c1", dir, share, root, options)
}

fn prepare_volume_for(id: &str, dir: &Path, share: &Share, root: &Path, options: &[&str]) -> PathBuf {
    let bundle = bundle(dir, |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/host", "type": "bind", "source": root, "options": options}));
    });
    let rootfs = [overlay(dir, 1)];
    let prepared = prepare_from(&bundle, id, &share.host, &rootfs).unwrap();
    assert_eq!(prepared.needs_propagation, options.contains(&"rslave"));
    guest_source(share, &prepared, 2)
}
