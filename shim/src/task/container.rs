//! One container of a sandbox and its processes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tokio::task::JoinSet;

use super::process::Process;
use super::refusal::Refusal;
use crate::lock;
use crate::spec::Spec;

/// An exec: its process, and what to run, kept until it is started.
pub struct Exec {
    /// Its process.
    pub process: Arc<Process>,
    /// The process' specification for the guest.
    pub spec: Vec<u8>,
    /// Its AppArmor profile, if any.
    pub profile: String,
    /// Type URL of that specification.
    pub type_url: String,
}

/// A container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle on the host.
    pub bundle: String,
    /// The shim's part of its configuration.
    pub spec: Spec,
    /// Its first process.
    pub init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    paused: AtomicBool,
    oom_told: AtomicBool,
    /// What keeps its mirrored volumes up to date; ends with the container.
    _following: JoinSet<()>,
}

impl Container {
    /// A container whose first process was made.
    pub fn new(id: &str, bundle: &str, spec: Spec, init: Process, following: JoinSet<()>) -> Self {
        Self {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            spec,
            init: Arc::new(init),
            execs: Mutex::default(),
            paused: AtomicBool::new(false),
            oom_told: AtomicBool::new(false),
            _following: following,
        }
    }

    /// The first process, or an exec's.
    ///
    /// # Errors
    /// [`Refusal::NoProcess`].
    pub fn process(&self, exec: &str) -> Result<Arc<Process>, Refusal> {
        if exec.is_empty() { Ok(Arc::clone(&self.init)) } else { self.exec(exec).map(|e| Arc::clone(&e.process)) }
    }

    /// An exec.
    ///
    /// # Errors
    /// [`Refusal::NoProcess`].
    pub fn exec(&self, id: &str) -> Result<Arc<Exec>, Refusal> {
        lock(&self.execs).get(id).cloned().ok_or_else(|| Refusal::NoProcess(id.to_owned()))
    }

    /// Adds an exec.
    ///
    /// # Errors
    /// [`Refusal::Exists`] when its id is taken.
    pub fn add_exec(&self, exec: Exec) -> Result<(), Refusal> {
        let id = exec.process.exec.clone();
        match lock(&self.execs).entry(id) {
            std::collections::hash_map::Entry::Occupied(taken) => Err(Refusal::Exists(taken.key().clone())),
            std::collections::hash_map::Entry::Vacant(free) => {
                free.insert(Arc::new(exec));
                Ok(())
            }
        }
    }

    /// Forgets an exec.
    pub fn remove_exec(&self, id: &str) {
        lock(&self.execs).remove(id);
    }

    /// All processes, execs first: they end before the container's first does.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        let mut all: Vec<_> = lock(&self.execs).values().map(|exec| Arc::clone(&exec.process)).collect();
        all.push(Arc::clone(&self.init));
        all
    }

    /// Whether it is paused.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Notes whether it is paused.
    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    /// Whether it is the one that stands for its pod: nothing of it runs in the guest.
    pub fn is_pause(&self) -> bool {
        self.spec.is_sandbox()
    }

    /// True once: the first caller tells containerd that memory ran out.
    pub fn tell_oom(&self) -> bool {
        !self.oom_told.swap(true, Ordering::Relaxed)
    }
}

/// The containers of a sandbox, and the ids of those just being made.
#[derive(Default)]
pub struct Containers {
    slots: Mutex<HashMap<String, Option<Arc<Container>>>>,
}

impl Containers {
    /// Takes an id; [`Containers::insert`] or [`Containers::remove`] follows.
    ///
    /// # Errors
    /// [`Refusal::Exists`] when it is taken.
    pub fn reserve(&self, id: &str) -> Result<(), Refusal> {
        let mut slots = lock(&self.slots);
        if slots.contains_key(id) {
            return Err(Refusal::Exists(id.to_owned()));
        }
        slots.insert(id.to_owned(), None);
        Ok(())
    }

    /// Fills a reserved id.
    pub fn insert(&self, container: Arc<Container>) {
        lock(&self.slots).insert(container.id.clone(), Some(container));
    }

    /// Frees an id; returns whether it was the last.
    pub fn remove(&self, id: &str) -> bool {
        let mut slots = lock(&self.slots);
        slots.remove(id);
        slots.is_empty()
    }

    /// A container.
    ///
    /// # Errors
    /// [`Refusal::NoContainer`].
    pub fn get(&self, id: &str) -> Result<Arc<Container>, Refusal> {
        lock(&self.slots).get(id).cloned().flatten().ok_or(Refusal::NoContainer)
    }

    /// Whether there is none, not even one being made.
    pub fn is_empty(&self) -> bool {
        lock(&self.slots).is_empty()
    }

    /// Whether `id` is the only one.
    pub fn is_only(&self, id: &str) -> bool {
        let slots = lock(&self.slots);
        slots.len() == 1 && slots.contains_key(id)
    }

    /// All that were made.
    pub fn all(&self) -> Vec<Arc<Container>> {
        lock(&self.slots).values().flatten().cloned().collect()
    }
}
