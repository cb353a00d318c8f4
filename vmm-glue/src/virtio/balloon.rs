//! virtio-balloon (virtio 1.2, 5.5): reclaims guest memory on request, and reclaims free pages that the guest reports.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion};

use super::activation::{self, OpenedActivation};
use super::device::{ActivateError, Activation, Interrupt, VirtioDevice};
use super::queue::{
    Chain, Iov, QueueFault, Virtqueue, WAKE_TOKEN, WakeEvent, log_guest_fault, log_host_failure, read_config_bytes,
};
use super::saved::{ActiveState, DeviceValues, SaveError};
use crate::guest_memory::GuestMemory;
use crate::memory::hotplug;

/// Maximum sizes of the queues: inflate, deflate and free page reporting. Reporting is the third queue, because the
/// device offers neither statistics nor free page hints.
const QUEUE_SIZES: [u16; 3] = [64, 64, 64];
const REPORTING: usize = 2;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_REPORTING
const F_REPORTING: u64 = 1 << 5;
/// The balloon counts pages of 4 KiB, independent of the guest's page size.
const PAGE_SHIFT: u32 = 12;
const PAGE: usize = 1 << PAGE_SHIFT;
const PAGES_PER_MIB: u64 = 256;
/// Maximum number of page numbers in a request. Linux sends at most 256.
const MAX_PAGES: usize = 64 * 1024;

/// The balloon device.
pub struct Balloon {
    wake: WakeEvent,
    active: Option<Active>,
    /// Number of pages that the guest should give back.
    target: u32,
    /// Number of pages that the guest reports to have given back.
    actual: u32,
    /// Whether the target changed while the device was inactive. If so, the activation interrupts the driver, because
    /// the driver may have read the previous target: the driver reads the target as soon as it has set DRIVER_OK, and
    /// the device becomes active a little later.
    changed_while_inactive: bool,
}

struct Active {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    queues: Vec<Virtqueue>,
    release: ReleasePolicy,
}

/// Defines how pages are given back to the host.
struct ReleasePolicy {
    advice: libc::c_int,
    /// Address ranges (start, end) of huge pages. The balloon does not release huge pages. Huge pages go back to the
    /// host only when the guest unplugs them. Dropping a huge page would use up its reservation (mm/hugetlb.c). The
    /// page would then no longer belong to the pod, and the pod might not get the page back.
    huge_pages: Vec<(usize, usize)>,
}

impl ReleasePolicy {
    /// Chooses how to release pages of this guest memory.
    fn for_memory(memory: &GuestMemory) -> Self {
        // Shared memory needs MADV_REMOVE, because MADV_DONTNEED would leave the pages in the shared file.
        let shared = memory.iter().any(|region| region.file_offset().is_some());
        let huge_pages = memory.iter().filter(|region| hotplug::is_huge(region)).map(|region| {
            let start = region.as_ptr().addr();
            (start, start.saturating_add(region.size()))
        });
        Self { advice: if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED }, huge_pages: huge_pages.collect() }
    }
}

impl Balloon {
    /// Creates a device with target 0.
    pub fn new() -> io::Result<Self> {
        Ok(Self { wake: WakeEvent::new()?, active: None, target: 0, actual: 0, changed_while_inactive: false })
    }

    /// Sets the target, which is the total number of MiB that the guest should give back. The guest gives back as much
    /// as it can.
    pub fn set_target(&mut self, mib: u64) -> io::Result<()> {
        self.target = u32::try_from(mib.saturating_mul(PAGES_PER_MIB)).unwrap_or(u32::MAX);
        match &self.active {
            Some(active) => active.interrupt.config()?,
            None => self.changed_while_inactive = true,
        }
        Ok(())
    }

    /// Returns the number of MiB that the guest reports to have given back.
    pub fn actual_mib(&self) -> u64 {
        u64::from(self.actual) / PAGES_PER_MIB
    }

    fn serve(&mut self, index: usize) -> Result<(), QueueFault> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let memory = Arc::clone(&active.memory);
        let Some(queue) = active.queues.get_mut(index) else { return Ok(()) };
        queue.disable_notification(&memory)?;
        let mut more = true;
        for _ in 0..queue.size() {
            if let Some(chain) = queue.pop(&memory)? {
                match index {
                    0 => inflate(&memory, &chain, &active.release),
                    REPORTING => release_all(&chain.writable, &active.release),
                    // A deflate request only announces that the guest will use pages again. The host allocates the
                    // pages when the guest touches them.
                    _ => {}
                }
                queue.push(&memory, chain.head, 0)?;
            } else if !queue.enable_notification(&memory)? {
                more = false;
                break;
            }
        }
        if more {
            self.wake.wake();
        }
        queue.flush(&memory, &*active.interrupt)
    }
}

/// Releases the pages whose numbers the guest lists. Consecutive pages are released together.
fn inflate(memory: &GuestMemory, chain: &Chain<'_>, policy: &ReleasePolicy) {
    let mut numbers = chain.readable.clone();
    if numbers.len() / 4 > MAX_PAGES {
        return log_guest_fault(0, &"the balloon request is too long");
    }
    let mut run: Option<(u64, usize)> = None;
    while let Ok(bytes) = numbers.take::<4>() {
        let page = u64::from(u32::from_le_bytes(bytes));
        match &mut run {
            Some((first, count)) if *first + *count as u64 == page => *count += 1,
            _ => {
                release_run(memory, run.take(), policy);
                run = Some((page, 1));
            }
        }
    }
    release_run(memory, run, policy);
}

fn release_run(memory: &GuestMemory, run: Option<(u64, usize)>, policy: &ReleasePolicy) {
    let Some((first, count)) = run else { return };
    // Neither shift overflows, because a page number has 32 bits, and a run has at most MAX_PAGES pages.
    match memory.get_slice(GuestAddress(first << PAGE_SHIFT), count << PAGE_SHIFT) {
        Ok(slice) => release(slice.ptr_guard_mut().as_ptr(), slice.len(), policy),
        Err(_) => log_guest_fault(0, &"the balloon request has pages outside of guest memory"),
    }
}

fn release_all(buffers: &Iov<'_>, policy: &ReleasePolicy) {
    for part in buffers.as_slice() {
        release(part.iov_base.cast(), part.iov_len, policy);
    }
}

/// Drops the pages that lie completely within a range of guest memory. After that, these pages read as zeroes, or, in a
/// guest that was made from a template, as they were in the template. Drops no page if the range overlaps huge pages.
fn release(start: *mut u8, len: usize, policy: &ReleasePolicy) {
    let skipped = start.align_offset(PAGE);
    let len = len.saturating_sub(skipped) & !(PAGE - 1);
    let first = start.addr().wrapping_add(skipped);
    if len == 0 || policy.huge_pages.iter().any(|&(from, to)| first < to && from < first.saturating_add(len)) {
        return;
    }
    // SAFETY: callers pass a range of guest memory that vm-memory has checked and keeps mapped. No Rust reference
    // points to guest memory, and no code relies on the content of guest memory.
    let result = unsafe { libc::madvise(start.wrapping_add(skipped).cast(), len, policy.advice) };
    if result < 0 {
        let error = io::Error::last_os_error();
        log_host_failure(&format_args!("failed to release {len} bytes of guest memory for virtio-balloon: {error}"));
    }
}

impl MutEventSubscriber for Balloon {
    fn init(&mut self, ops: &mut EventOps) {
        self.wake.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let indices = match events.data() {
            WAKE_TOKEN => {
                self.wake.serve(ops);
                for queue in self.active.iter_mut().flat_map(|active| &mut active.queues) {
                    WakeEvent::register(ops, queue);
                }
                0..QUEUE_SIZES.len()
            }
            token => {
                let index = token as usize;
                if let Some(queue) = self.active.as_ref().and_then(|active| active.queues.get(index)) {
                    queue.clear_notification();
                }
                index..index + 1
            }
        };
        for index in indices {
            if let Err(fault) = self.serve(index) {
                let interrupt = self.active.as_ref().map(|active| Arc::clone(&active.interrupt));
                activation::stop_broken_device(self, "virtio-balloon", &fault, interrupt);
            }
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM
            | F_REPORTING
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config: Vec<u8> = [self.target, self.actual].into_iter().flat_map(u32::to_le_bytes).collect();
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(bytes)) = (offset, data.try_into()) {
            self.actual = u32::from_le_bytes(bytes);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        // A driver that has not acknowledged reporting does not set up the third queue.
        let count = if activation.features & F_REPORTING != 0 { REPORTING + 1 } else { REPORTING };
        let OpenedActivation { memory, interrupt, queues, .. } = activation::open_first_queues(activation, count)?;
        if self.changed_while_inactive {
            interrupt.config().map_err(|error| ActivateError::Host("the interrupt for the balloon target", error))?;
            self.changed_while_inactive = false;
        }
        let release = ReleasePolicy::for_memory(&memory);
        self.active = Some(Active { memory, interrupt, queues, release });
        self.wake.wake();
        Ok(())
    }

    fn reset(&mut self) {
        self.actual = 0;
        for queue in self.active.take().into_iter().flat_map(|active| active.queues) {
            self.wake.retire(queue);
        }
    }

    fn save(&self) -> Result<ActiveState, SaveError> {
        let states = self.active.iter().flat_map(|active| &active.queues).map(Virtqueue::state);
        let queues = states.collect::<Option<Vec<_>>>().ok_or(SaveError::Busy(VIRTIO_ID_BALLOON))?;
        let (target, actual) = (self.target, self.actual);
        Ok(ActiveState { queues, values: DeviceValues::Balloon { target, actual } })
    }

    fn restore(&mut self, values: DeviceValues) {
        if let DeviceValues::Balloon { target, actual } = values {
            (self.target, self.actual) = (target, actual);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::virtio::testing::Bench;

    const AT: u64 = 80 << 20;

    fn numbers(pages: &[u32]) -> Vec<u8> {
        pages.iter().flat_map(|page| page.to_le_bytes()).collect()
    }

    #[test]
    fn inflate_drops_exactly_the_listed_pages() {
        let mut bench = Bench::new(Balloon::new().unwrap());
        bench.activate(0);
        bench.memory.write_slice(&[7; PAGE * 4], GuestAddress(AT)).unwrap();
        let first = (AT >> PAGE_SHIFT) as u32;
        bench.queues[0].add(&[&numbers(&[first, first + 1]), &numbers(&[u32::MAX, first + 3])], &[]);
        bench.run();
        assert!(bench.queues[0].poll().is_some());
        let bytes: Vec<u8> =
            (0..4).map(|page| bench.memory.read_obj(GuestAddress(AT + page * 4096)).unwrap()).collect();
        assert_eq!(bytes, [0, 0, 7, 0]);
    }

    #[test]
    fn reported_pages_are_dropped() {
        let mut bench = Bench::new(Balloon::new().unwrap());
        bench.activate(0);
        // The buffers in this queue are the free pages.
        let queue = &mut bench.queues[2];
        let address = queue.buffer(queue.free_descriptors() as u16 - 1);
        let first = queue.add(&[], &[8192]);
        assert_eq!(queue.poll().map(|(head, _)| head), None);
        let address = if first == 0 { queue.buffer(0) } else { address };
        bench.memory.write_slice(&[7; 8192], GuestAddress(address)).unwrap();
        bench.run();
        assert_eq!(bench.queues[2].poll().unwrap().0, first);
        assert_eq!(bench.memory.read_obj::<u64>(GuestAddress(address)).unwrap(), 0);
    }

    #[test]
    fn huge_pages_are_not_released() {
        let mut pages = vec![7u8; PAGE * 3];
        let start = pages.as_mut_ptr().wrapping_add(pages.as_ptr().align_offset(PAGE));
        let huge_pages = vec![(start.addr() + PAGE, start.addr() + 2 * PAGE)];
        let policy = ReleasePolicy { advice: libc::MADV_DONTNEED, huge_pages };
        release(start.wrapping_add(PAGE / 2), PAGE, &policy);
        release(start, PAGE * 2, &policy);
        release(start, PAGE, &policy);
        let at = |offset: usize| pages[start.addr() - pages.as_ptr().addr() + offset];
        assert_eq!((at(0), at(PAGE)), (0, 7));
    }

    #[test]
    fn target_is_visible_in_configuration_space() {
        let mut bench = Bench::new(Balloon::new().unwrap());
        bench.activate(F_REPORTING);
        bench.lock().set_target(3).unwrap();
        assert_eq!(bench.irq.config.load(Ordering::SeqCst), 1);
        let mut config = [0; 8];
        bench.lock().read_config(0, &mut config);
        assert_eq!(config[..4], 768_u32.to_le_bytes());
        bench.lock().write_config(4, &512_u32.to_le_bytes());
        assert_eq!(bench.lock().actual_mib(), 2);
    }

    #[test]
    fn driver_is_interrupted_for_target_that_changed_before_activation() {
        let mut bench = Bench::new(Balloon::new().unwrap());
        bench.lock().set_target(3).unwrap();
        for _ in 0..2 {
            bench.activate(0);
            assert_eq!(bench.irq.config.load(Ordering::SeqCst), 1);
            bench.lock().reset();
            bench.run();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn device_does_not_panic_on_any_page_numbers(
            pages in proptest::collection::vec(any::<u32>(), 0..600),
            cut in 0usize..4,
        ) {
            let mut bench = Bench::new(Balloon::new().unwrap());
            bench.activate(0);
            let mut bytes = numbers(&pages);
            bytes.truncate(bytes.len().saturating_sub(cut));
            bench.queues[0].add(&[&bytes], &[]);
            bench.queues[1].add(&[&bytes], &[]);
            bench.run();
            // The request may list the pages that contain the queue itself. The device then drops the queue's content,
            // and must not panic.
        }
    }
}
