//! Fuzzes two kinds of requests to the agent: updates of mirrored volumes, and requests to create subdirectories of
//! volumes. No request may change a file outside of the volumes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use husk_agent::testing::{mirror, open_subpath};
use husk_proto::agent::mirror_entry::Kind;
use husk_proto::agent::{MirrorEntry, UpdateMirrorRequest, VolumeDirectory};

use crate::input::input;
use crate::jail::{Jail, Only};

/// Directory of the mirrored volumes.
const MIRRORS: &str = "/top/mirrors";
const VOLUME: &str = "/top/volume";
const OUTSIDE: [&str; 3] = ["/far", "/top/outside", "/top/full/inner"];
/// Names for the requests. Some of these names would lead out of a volume.
const NAMES: [&str; 14] =
    ["", "a", "a/b", "b", "link", "link/x", "..", "../outside", "/far", "/top/full", ".", "a/../..", "3.new", "full"];

#[derive(arbitrary::Arbitrary, Debug)]
enum Name {
    Known(u8),
    Any(Vec<u8>),
}

impl Name {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Name::Known(which) => NAMES[usize::from(*which) % NAMES.len()].into(),
            Name::Any(bytes) => bytes.clone(),
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Entry {
    kind: u8,
    path: Name,
    content: Name,
    mode: u16,
    owner: (u8, u8),
    more: bool,
    offset: u8,
    modified: i64,
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Update {
    container: Option<Name>,
    mount: u8,
    entries: Vec<Entry>,
    last: bool,
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    updates: Vec<Update>,
    removed: Name,
    directories: Vec<(Name, u16)>,
}

fn state() -> Vec<(u64, u32, i64, Vec<u8>)> {
    let of = |path| {
        let meta = fs::symlink_metadata(path).expect("read the metadata of a file outside the volumes");
        (meta.ino(), meta.mode(), meta.ctime_nsec(), fs::read(path).expect("read a file outside the volumes"))
    };
    OUTSIDE.into_iter().map(of).collect()
}

fn make_surroundings() {
    for dir in [MIRRORS, VOLUME, "/top/full"] {
        fs::create_dir_all(dir).expect("create a directory");
    }
    for file in OUTSIDE {
        fs::write(file, "content").expect("create a file outside the volumes");
    }
}

fn serve(input: &Input) {
    let before = state();
    let entry = |entry: &Entry| MirrorEntry {
        kind: [Kind::DIRECTORY, Kind::FILE, Kind::SYMLINK][usize::from(entry.kind) % 3].into(),
        path: entry.path.bytes(),
        content: entry.content.bytes(),
        mode: entry.mode.into(),
        uid: entry.owner.0.into(),
        gid: entry.owner.1.into(),
        more: entry.more,
        offset: entry.offset.into(),
        modified_ns: entry.modified,
        ..Default::default()
    };
    let updates: Vec<_> = input
        .updates
        .iter()
        .take(8)
        .map(|update| UpdateMirrorRequest {
            container_id: update.container.as_ref().map_or_else(|| "c".to_owned(), Name::text),
            mount: (update.mount % 4).into(),
            entries: update.entries.iter().take(16).map(entry).collect(),
            last: update.last,
            ..Default::default()
        })
        .collect();
    mirror(Path::new(MIRRORS), &updates, &input.removed.text());
    let directory =
        |(name, mode): &(Name, u16)| VolumeDirectory { name: name.text(), mode: (*mode).into(), ..Default::default() };
    let directories: Vec<_> = input.directories.iter().take(8).map(directory).collect();
    open_subpath(Path::new(VOLUME), &directories);
    assert!(before == state(), "a file outside of the volumes changed");
    let top = fs::read_dir("/top").expect("list /top").count();
    assert_eq!(top, 4, "a file outside of the volumes appeared or disappeared in /top");
    for dir in [MIRRORS, VOLUME] {
        fs::remove_dir_all(dir).expect("remove a directory");
        fs::create_dir_all(dir).expect("create a directory");
    }
}

static JAIL: Only<Input> = Only::new();

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let Some(input) = input::<Input>(bytes) else { return };
    JAIL.get_or_init(|| Jail::new(make_surroundings, |(), input| serve(&input))).run(input);
}
