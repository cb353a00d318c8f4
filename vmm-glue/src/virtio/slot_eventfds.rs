//! Registers the eventfds of a slot with KVM. One eventfd interrupts the guest. Each queue has its own eventfd for the
//! guest's notifications.
//!
//! KVM keeps an ioeventfd until it is unregistered, even if its fd is closed. If an ioeventfd stayed registered, the
//! eventfds of the slot's next device could not be registered.

use kvm_ioctls::{Error, IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::mmio;
use crate::arch::layout;

/// KVM's registry of eventfds.
pub trait Registry {
    /// Makes KVM raise interrupt `gsi` when `fd` is signalled (KVM_IRQFD).
    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), Error>;
    /// Undoes `register_irqfd` (KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN).
    fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), Error>;
    /// Makes KVM signal `fd` when the guest writes the number `queue` to `address` (KVM_IOEVENTFD).
    fn register_ioevent(&self, fd: &EventFd, address: &IoEventAddress, queue: u32) -> Result<(), Error>;
    /// Undoes `register_ioevent` (KVM_IOEVENTFD with KVM_IOEVENTFD_FLAG_DEASSIGN).
    fn unregister_ioevent(&self, fd: &EventFd, address: &IoEventAddress, queue: u32) -> Result<(), Error>;
}

impl Registry for VmFd {
    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), Error> {
        VmFd::register_irqfd(self, fd, gsi)
    }

    fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), Error> {
        VmFd::unregister_irqfd(self, fd, gsi)
    }

    fn register_ioevent(&self, fd: &EventFd, address: &IoEventAddress, queue: u32) -> Result<(), Error> {
        VmFd::register_ioevent(self, fd, address, queue)
    }

    fn unregister_ioevent(&self, fd: &EventFd, address: &IoEventAddress, queue: u32) -> Result<(), Error> {
        VmFd::unregister_ioevent(self, fd, address, queue)
    }
}

/// Registers a slot's eventfds.
///
/// # Errors
/// KVM's error. After an error, none of the eventfds is registered.
pub fn register(kvm: &dyn Registry, slot: u32, irq: &EventFd, queues: &[EventFd]) -> Result<(), Error> {
    kvm.register_irqfd(irq, layout::slot_gsi(slot))?;
    for (queue, notify) in (0u32..).zip(queues) {
        if let Err(error) = kvm.register_ioevent(notify, &notify_address(slot), queue) {
            let registered = queues.get(..queue as usize).unwrap_or_default();
            if let Err(error) = unregister(kvm, slot, irq, registered) {
                log::warn!("slot {slot}: failed to unregister an eventfd: {error}");
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Unregisters a slot's eventfds.
///
/// # Errors
/// KVM's first error. After an error, this function goes on and unregisters the other eventfds.
pub fn unregister(kvm: &dyn Registry, slot: u32, irq: &EventFd, queues: &[EventFd]) -> Result<(), Error> {
    let mut result = Ok(());
    for (queue, notify) in (0u32..).zip(queues) {
        let unregistered = kvm.unregister_ioevent(notify, &notify_address(slot), queue);
        result = result.and(unregistered);
    }
    let unregistered = kvm.unregister_irqfd(irq, layout::slot_gsi(slot));
    result.and(unregistered)
}

fn notify_address(slot: u32) -> IoEventAddress {
    IoEventAddress::Mmio(layout::slot_address(slot) + mmio::NOTIFY_OFFSET)
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeSet;

    use super::*;

    /// Records the registered eventfds: `None` stands for the interrupt, and `Some` for a queue. The call with number
    /// `fail_at` fails.
    #[derive(Default)]
    struct FakeKvm {
        registered: RefCell<BTreeSet<Option<u32>>>,
        calls: Cell<usize>,
        fail_at: Option<usize>,
    }

    impl FakeKvm {
        fn call(&self, change: impl FnOnce(&mut BTreeSet<Option<u32>>) -> bool) -> Result<(), Error> {
            let number = self.calls.replace(self.calls.get() + 1);
            if self.fail_at == Some(number) {
                return Err(Error::new(libc::ENOSPC));
            }
            assert!(change(&mut self.registered.borrow_mut()), "call {number} must change the set of eventfds");
            Ok(())
        }
    }

    impl Registry for FakeKvm {
        fn register_irqfd(&self, _: &EventFd, _: u32) -> Result<(), Error> {
            self.call(|registered| registered.insert(None))
        }

        fn unregister_irqfd(&self, _: &EventFd, _: u32) -> Result<(), Error> {
            self.call(|registered| registered.remove(&None))
        }

        fn register_ioevent(&self, _: &EventFd, _: &IoEventAddress, queue: u32) -> Result<(), Error> {
            self.call(|registered| registered.insert(Some(queue)))
        }

        fn unregister_ioevent(&self, _: &EventFd, _: &IoEventAddress, queue: u32) -> Result<(), Error> {
            self.call(|registered| registered.remove(&Some(queue)))
        }
    }

    fn eventfds() -> (EventFd, Vec<EventFd>) {
        let new = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (new(), (0..3).map(|_| new()).collect())
    }

    #[test]
    fn failed_register_leaves_nothing_registered() {
        let (irq, queues) = eventfds();
        for fail_at in 0..4 {
            let kvm = FakeKvm { fail_at: Some(fail_at), ..Default::default() };
            assert_eq!(register(&kvm, 2, &irq, &queues).unwrap_err().errno(), libc::ENOSPC);
            assert!(kvm.registered.borrow().is_empty(), "an eventfd is registered after call {fail_at} has failed");
        }
    }

    #[test]
    fn failed_unregister_still_unregisters_the_other_eventfds() {
        let (irq, queues) = eventfds();
        for (fail_at, left) in [(4, Some(0)), (5, Some(1)), (7, None)] {
            let kvm = FakeKvm { fail_at: Some(fail_at), ..Default::default() };
            register(&kvm, 2, &irq, &queues).unwrap();
            assert_eq!(unregister(&kvm, 2, &irq, &queues).unwrap_err().errno(), libc::ENOSPC);
            let expected = BTreeSet::from([left]);
            assert_eq!(*kvm.registered.borrow(), expected, "wrong eventfds are left after call {fail_at} has failed");
        }
        let kvm = FakeKvm::default();
        register(&kvm, 2, &irq, &queues).unwrap();
        unregister(&kvm, 2, &irq, &queues).unwrap();
        assert!(kvm.registered.borrow().is_empty());
    }
}
