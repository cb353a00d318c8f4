//! The containers of a sandbox, and the processes of each container.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use crate::container::process::Process;
use crate::error::ServiceError;
use crate::lock;
use crate::oci::Spec;

/// An exec of a container.
pub struct Exec {
    /// State of the process.
    pub process: Arc<Process>,
    /// Process specification, which the guest gets when the exec is started.
    pub spec: Vec<u8>,
    /// AppArmor profile. Empty if the request does not set a profile.
    pub profile: String,
    /// Type URL of `spec`.
    pub type_url: String,
}

/// A container.
pub struct Container {
    /// Container id.
    pub id: String,
    /// Bundle directory on the host.
    pub bundle: String,
    /// The part of the container's `config.json` that the shim reads.
    pub spec: Spec,
    /// State of the init process.
    pub init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    paused: AtomicBool,
    oom_reported: AtomicBool,
    exit_guarded: AtomicBool,
    delete_failed: AtomicBool,
    /// Tasks that keep the mirrored volumes up to date. The tasks stop when the `Container` is dropped.
    _mirroring: JoinSet<()>,
}

impl Container {
    /// Returns a container whose init process has been created.
    pub fn new(id: &str, bundle: &str, spec: Spec, init: Process, mirroring: JoinSet<()>) -> Self {
        Self {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            spec,
            init: Arc::new(init),
            execs: Mutex::default(),
            paused: AtomicBool::new(false),
            oom_reported: AtomicBool::new(false),
            exit_guarded: AtomicBool::new(false),
            delete_failed: AtomicBool::new(false),
            _mirroring: mirroring,
        }
    }

    /// Returns the init process if `exec` is empty. Otherwise, returns the process of the exec with the id `exec`.
    ///
    /// # Errors
    /// [`ServiceError::NoProcess`] if the container has no exec with this id.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>, ServiceError> {
        if exec.is_empty() { Ok(Arc::clone(&self.init)) } else { self.exec(exec).map(|e| Arc::clone(&e.process)) }
    }

    /// Returns the exec with this id.
    ///
    /// # Errors
    /// [`ServiceError::NoProcess`] if the container has no exec with this id.
    pub fn exec(&self, id: &str) -> Result<Arc<Exec>, ServiceError> {
        lock(&self.execs).get(id).cloned().ok_or_else(|| ServiceError::NoProcess(id.to_owned()))
    }

    /// Adds an exec.
    ///
    /// # Errors
    /// [`ServiceError::Exists`] if the container already has an exec with this id.
    pub fn add_exec(&self, exec: Exec) -> Result<(), ServiceError> {
        let id = exec.process.exec.clone();
        match lock(&self.execs).entry(id) {
            std::collections::hash_map::Entry::Occupied(taken) => Err(ServiceError::Exists(taken.key().clone())),
            std::collections::hash_map::Entry::Vacant(free) => {
                free.insert(Arc::new(exec));
                Ok(())
            }
        }
    }

    /// Removes an exec.
    pub fn remove_exec(&self, id: &str) {
        lock(&self.execs).remove(id);
    }

    /// Returns the execs' processes, then the init process. When the VM has ended, the shim publishes the exits in this
    /// order.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        let mut all: Vec<_> = lock(&self.execs).values().map(|exec| Arc::clone(&exec.process)).collect();
        all.push(Arc::clone(&self.init));
        all
    }

    /// Returns whether the container is paused.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Records whether the container is paused.
    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    /// Returns whether this is the sandbox container of a pod. A sandbox container has no process in the guest.
    pub fn is_sandbox_container(&self) -> bool {
        self.spec.annotations.is_sandbox()
    }

    /// Returns true for the first call only. If the result is true, the caller must watch for the container's exit.
    pub fn claim_exit_guard(&self) -> bool {
        !self.exit_guarded.swap(true, Ordering::Relaxed)
    }

    /// Returns true for the first call only. If the result is false, the agent has failed to delete the container
    /// before.
    pub fn claim_delete_failure(&self) -> bool {
        !self.delete_failed.swap(true, Ordering::Relaxed)
    }

    /// Returns true for the first call only. If the result is true, the caller must publish the OOM event.
    pub fn claim_oom_report(&self) -> bool {
        !self.oom_reported.swap(true, Ordering::Relaxed)
    }
}

/// What an id stands for.
enum Slot {
    /// A container that is being created. The value becomes true when the creation is to be cancelled.
    Reserved(watch::Sender<bool>),
    Taken(Arc<Container>),
}

/// The containers of a sandbox, by id.
#[derive(Default)]
pub struct Containers {
    slots: Mutex<HashMap<String, Slot>>,
    /// Notified when an id that was reserved is free or belongs to a container.
    decided: Notify,
}

/// A reserved id. When the reservation is dropped, the id becomes free, unless a container was stored under it.
pub struct Reservation<'a> {
    containers: &'a Containers,
    id: String,
    cancelled: watch::Receiver<bool>,
}

impl Reservation<'_> {
    /// Runs `work` until it ends, or until the creation of the container is cancelled. `work` must leave nothing behind
    /// when it is dropped.
    ///
    /// # Errors
    /// [`ServiceError::Cancelled`], or the error of `work`.
    pub async fn unless_cancelled<T>(
        &self,
        work: impl Future<Output = Result<T, ServiceError>>,
    ) -> Result<T, ServiceError> {
        let mut cancelled = self.cancelled.clone();
        tokio::select! {
            // A creation that was cancelled earlier must not begin `work`.
            biased;
            // The sender exists until the reservation ends, so this branch runs only after a cancellation.
            _ = cancelled.wait_for(|cancelled| *cancelled) => Err(ServiceError::Cancelled),
            result = work => result,
        }
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut slots = lock(&self.containers.slots);
        if matches!(slots.get(&self.id), Some(Slot::Reserved(_))) {
            slots.remove(&self.id);
        }
        drop(slots);
        self.containers.decided.notify_waiters();
    }
}

impl Containers {
    /// Reserves an id, until [`Containers::insert`] is called or the reservation is dropped.
    ///
    /// # Errors
    /// [`ServiceError::Exists`] if the id is reserved or belongs to a container.
    pub fn reserve(&self, id: &str) -> Result<Reservation<'_>, ServiceError> {
        let mut slots = lock(&self.slots);
        if slots.contains_key(id) {
            return Err(ServiceError::Exists(id.to_owned()));
        }
        let (cancel, cancelled) = watch::channel(false);
        slots.insert(id.to_owned(), Slot::Reserved(cancel));
        Ok(Reservation { containers: self, id: id.to_owned(), cancelled })
    }

    /// Stores a container under its reserved id.
    pub fn insert(&self, container: Arc<Container>) {
        lock(&self.slots).insert(container.id.clone(), Slot::Taken(container));
    }

    /// Cancels the creation of the container `id`, or the creations of all containers if `id` is `None`. Waits until
    /// these ids are free, or belong to a container because the cancellation came too late.
    pub async fn cancel(&self, id: Option<&str>) {
        loop {
            let decided = self.decided.notified();
            tokio::pin!(decided);
            // From here on, no notification is missed.
            decided.as_mut().enable();
            let mut waiting = false;
            for (slot_id, slot) in lock(&self.slots).iter() {
                if let Slot::Reserved(cancel) = slot
                    && id.is_none_or(|id| id == slot_id)
                {
                    cancel.send_replace(true);
                    waiting = true;
                }
            }
            if !waiting {
                return;
            }
            decided.await;
        }
    }

    /// Removes an id. Returns true if no ids remain.
    pub fn remove(&self, id: &str) -> bool {
        let mut slots = lock(&self.slots);
        slots.remove(id);
        slots.is_empty()
    }

    /// Returns the container with this id.
    ///
    /// # Errors
    /// [`ServiceError::NoContainer`] if no container has this id. A reserved id has no container.
    pub fn get(&self, id: &str) -> Result<Arc<Container>, ServiceError> {
        match lock(&self.slots).get(id) {
            Some(Slot::Taken(container)) => Ok(Arc::clone(container)),
            _ => Err(ServiceError::NoContainer),
        }
    }

    /// Returns true if there are neither containers nor reserved ids.
    pub fn is_empty(&self) -> bool {
        lock(&self.slots).is_empty()
    }

    /// Returns true if `id` is the only id. Reserved ids count.
    pub fn is_only(&self, id: &str) -> bool {
        let slots = lock(&self.slots);
        slots.len() == 1 && slots.contains_key(id)
    }

    /// Returns all containers.
    pub fn all(&self) -> Vec<Arc<Container>> {
        let taken = |slot: &Slot| match slot {
            Slot::Taken(container) => Some(Arc::clone(container)),
            Slot::Reserved(_) => None,
        };
        lock(&self.slots).values().filter_map(taken).collect()
    }
}
