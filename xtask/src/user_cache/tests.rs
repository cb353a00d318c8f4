//! Tests with several clones of the repository that share one cache.

use std::cell::Cell;

use super::*;

/// A clone of the repository, with the outputs of a step: a file and a directory.
struct Clone {
    dir: PathBuf,
    outputs: [PathBuf; 2],
    builds: Cell<u32>,
}

impl Clone {
    fn new(dir: PathBuf) -> Clone {
        let outputs = [dir.join("kernel/vmlinux"), dir.join("kernel/modules")];
        Clone { dir, outputs, builds: Cell::new(0) }
    }

    fn run(&self, cache: Option<&Cache>, key: &str) -> Result<Origin> {
        let outputs = [&*self.outputs[0], &*self.outputs[1]];
        let stamp = Stamp::at(self.dir.join("stamps/kernel"));
        Step { kind: "kernel", key, outputs: &outputs, stamp }.run_with(cache, || {
            assert!(
                !self.outputs[0].exists(),
                "the old output is still a hard link to a file of the cache, so the build would overwrite that file"
            );
            self.builds.set(self.builds.get() + 1);
            files::make_dir(&self.outputs[1].join("deep"))?;
            fs::write(&self.outputs[0], key)?;
            Ok(fs::write(self.outputs[1].join("deep/a.ko"), key)?)
        })
    }

    fn content(&self) -> (String, String) {
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        (read(&self.outputs[0]), read(&self.outputs[1].join("deep/a.ko")))
    }
}

fn cache(dir: &Path) -> Cache {
    Cache::open(dir.join("cache/husk")).unwrap()
}

fn used(entry: &Path, days_ago: u64) {
    let at = SystemTime::now() - Duration::from_secs(days_ago * DAY);
    File::open(entry).unwrap().set_modified(at).unwrap();
}

#[test]
fn another_clone_takes_the_outputs_from_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path());
    let (one, two) = (Clone::new(dir.path().join("one")), Clone::new(dir.path().join("two")));
    assert_eq!(one.run(Some(&cache), "k1").unwrap(), Origin::Build);
    assert_eq!(one.run(Some(&cache), "k1").unwrap(), Origin::Present);
    assert_eq!(two.run(Some(&cache), "k1").unwrap(), Origin::Cache);
    assert_eq!((two.content(), two.builds.get()), (("k1".into(), "k1".into()), 0));
    // The inputs change, and then change back.
    assert_eq!(two.run(Some(&cache), "k2").unwrap(), Origin::Build);
    assert_eq!(two.content(), ("k2".into(), "k2".into()));
    assert_eq!(one.run(Some(&cache), "k2").unwrap(), Origin::Cache);
    assert_eq!(two.run(Some(&cache), "k1").unwrap(), Origin::Cache);
    assert_eq!((one.content().0, two.content().0), ("k2".into(), "k1".into()));
    let left: Vec<_> = fs::read_dir(cache.dir.join("kernel")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !is_part(name)), "{left:?}");
}

#[test]
fn clones_that_run_at_the_same_time_build_only_once() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path());
    let builds: u32 = std::thread::scope(|scope| {
        let run = |name: &str| {
            let clone = Clone::new(dir.path().join(name));
            let cache = &cache;
            scope.spawn(move || {
                clone.run(Some(cache), "k1").unwrap();
                assert_eq!(clone.content(), ("k1".into(), "k1".into()));
                clone.builds.get()
            })
        };
        [run("one"), run("two"), run("three")].into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(builds, 1);
}

#[test]
fn existing_outputs_are_added_to_a_new_cache() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (Clone::new(dir.path().join("one")), Clone::new(dir.path().join("two")));
    assert_eq!(one.run(None, "k1").unwrap(), Origin::Build);
    let cache = cache(dir.path());
    assert_eq!(one.run(Some(&cache), "k1").unwrap(), Origin::Present);
    assert_eq!(two.run(Some(&cache), "k1").unwrap(), Origin::Cache);
    assert_eq!((one.builds.get(), two.builds.get()), (1, 0));
}

#[test]
fn incomplete_entries_and_failed_builds_are_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path());
    let clone = Clone::new(dir.path().join("one"));
    fs::create_dir_all(cache.dir.join("kernel/k1")).unwrap();
    assert_eq!(clone.run(Some(&cache), "k1").unwrap(), Origin::Build);
    let stamp = Stamp::at(clone.dir.join("stamps/kernel"));
    let outputs = [&*clone.outputs[0]];
    let step = Step { kind: "kernel", key: "k2", outputs: &outputs, stamp };
    assert!(step.run_with(Some(&cache), || bail!("no compiler")).is_err());
    assert!(!cache.dir.join("kernel/k2").exists());
    assert_eq!(clone.run(Some(&cache), "k2").unwrap(), Origin::Build);
}

#[test]
fn old_and_surplus_entries_are_pruned() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path());
    let clone = Clone::new(dir.path().join("one"));
    for (days, key) in ["k0", "k1", "k2", "k3"].into_iter().enumerate() {
        clone.run(Some(&cache), key).unwrap();
        used(&cache.dir.join("kernel").join(key), 4 - days as u64);
    }
    let kept = || -> Vec<String> {
        let entries = entries(&cache.dir.join("kernel")).unwrap();
        entries.iter().map(|entry| entry.path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
    };
    assert_eq!(kept(), ["k3", "k2", "k1"]);
    // Using an entry makes it the newest entry.
    used(&cache.dir.join("kernel/k3"), 31);
    clone.run(Some(&cache), "k1").unwrap();
    let part = cache.dir.join("kernel").join(format!("{PART}x"));
    fs::create_dir(&part).unwrap();
    prune(&cache.dir.join("kernel"), SystemTime::now()).unwrap();
    assert_eq!(kept(), ["k1", "k2"]);
    assert!(part.exists());
    used(&part, 2);
    prune(&cache.dir.join("kernel"), SystemTime::now()).unwrap();
    assert!(!part.exists());
    let text = list(&cache.dir, &kinds(&cache.dir).unwrap(), SystemTime::now()).unwrap();
    assert!(text.contains("kernel/k1\n") && text.lines().count() == 4, "{text}");
}

#[test]
fn without_a_cache_directory_outputs_are_built() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(Cache::open(file.join("husk")).is_err());
    let clone = Clone::new(dir.path().join("one"));
    assert_eq!(clone.run(None, "k1").unwrap(), Origin::Build);
    assert_eq!(clone.run(None, "k1").unwrap(), Origin::Present);
    // A cache that becomes unusable after it was opened does not cause an error either.
    let broken = Cache { dir: file };
    assert_eq!(clone.run(Some(&broken), "k2").unwrap(), Origin::Build);
    assert_eq!(clone.content().0, "k2");
}

#[test]
fn directory_comes_from_the_environment() {
    let directory = |xdg: Option<&str>, home: Option<&str>| directory(xdg.map(Into::into), home.map(Into::into)).ok();
    assert_eq!(directory(Some("/x"), Some("/h")), Some("/x/husk".into()));
    assert_eq!(directory(None, Some("/h")), Some("/h/.cache/husk".into()));
    assert_eq!(directory(Some("x"), Some("/h")), Some("/h/.cache/husk".into()));
    assert_eq!(directory(Some(""), Some("")), None);
    assert_eq!(directory(None, None), None);
}
