//! Locks without poisoning.
//!
//! A lock is poisoned if a thread panics while it holds the lock. Husk ignores poisoning. In the release build, a panic
//! aborts the process, so no thread ever sees a poisoned lock. In a test build, a panic unwinds. A second panic at the
//! poisoned lock would then hide the first panic. The first panic is the failure that the test must report.

use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, WaitTimeoutResult,
};
use std::time::Duration;

/// Locks a mutex, poisoned or not.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks for reading, poisoned or not.
pub fn read<T: ?Sized>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Locks for writing, poisoned or not.
pub fn write<T: ?Sized>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Consumes a mutex, poisoned or not, and returns its value.
pub fn into_inner<T>(mutex: Mutex<T>) -> T {
    mutex.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a notification, and locks the mutex again, poisoned or not. Spurious wakeups are possible.
pub fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Waits like [`wait`], but for at most `timeout`. The result says whether the wait timed out.
pub fn wait_timeout<'a, T>(
    condition: &Condvar,
    guard: MutexGuard<'a, T>,
    timeout: Duration,
) -> (MutexGuard<'a, T>, WaitTimeoutResult) {
    condition.wait_timeout(guard, timeout).unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn locks_work_after_a_panic() {
        let shared = Arc::new((Mutex::new(1), RwLock::new(2), Condvar::new()));
        let holder = shared.clone();
        let panicked = std::thread::spawn(move || {
            let _guards = (lock(&holder.0), write(&holder.1));
            panic!("poison both locks");
        });
        assert!(panicked.join().is_err());
        assert!(shared.0.is_poisoned() && shared.1.is_poisoned());
        *write(&shared.1) += 1;
        assert_eq!((*lock(&shared.0), *read(&shared.1)), (1, 3));
        let (guard, result) = wait_timeout(&shared.2, lock(&shared.0), Duration::from_millis(1));
        assert!(result.timed_out() && *guard == 1);
        drop(guard);
        let (mutex, _, _) = Arc::into_inner(shared).unwrap();
        assert_eq!(into_inner(mutex), 1);
    }

    #[test]
    fn wait_returns_after_a_notification() {
        let shared = Arc::new((Mutex::new(false), Condvar::new()));
        let waker = shared.clone();
        let thread = std::thread::spawn(move || {
            *lock(&waker.0) = true;
            waker.1.notify_all();
        });
        let mut done = lock(&shared.0);
        while !*done {
            done = wait(&shared.1, done);
        }
        drop(done);
        thread.join().unwrap();
    }
}
