//! Tests of virtqueues without a device and an event loop. Unlike the tests of devices, these tests run under Miri.

use proptest::prelude::*;

use super::*;
use crate::virtio::testing::{Irq, queue_without_device};

/// Size of guest memory in bytes.
const MEMORY: u64 = 0x10000 + (SIZE as u64) * (128 << 10);
const SIZE: u16 = 8;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

#[test]
fn buffers_of_a_chain_are_read_and_written_in_parts() {
    let (memory, mut driver, mut queue) = queue_without_device(SIZE);
    let head = driver.add(&[b"abcd", b"efg"], &[3, 4]);
    let mut chain = queue.pop(&memory).unwrap().unwrap();
    assert_eq!((chain.head, chain.readable.len(), chain.writable.len()), (head, 7, 7));
    assert_eq!(chain.readable.take::<5>().unwrap(), *b"abcde");
    let mut rest = [0; 4];
    assert_eq!((chain.readable.copy_to(&mut rest), &rest), (2, b"fg\0\0"));
    assert!(matches!(chain.readable.take::<3>(), Err(ChainFault::Short)));
    chain.readable.skip(9);
    assert!(chain.readable.is_empty() && chain.readable.as_slice().is_empty());
    assert_eq!(chain.writable.copy_from(b"12345678"), 7);
    chain.writable.skip(2);
    chain.writable.truncate(3);
    assert_eq!((chain.writable.len(), chain.writable.copy_from(b"xyz!")), (3, 3));
    chain.writable.truncate(1);
    assert_eq!((chain.writable.as_slice().len(), chain.writable.copy_from(b"?!")), (1, 1));
    queue.push(&memory, head, 7).unwrap();
    assert_eq!(driver.poll(), Some((head, b"12?yz67".to_vec())));
    assert!(queue.pop(&memory).unwrap().is_none());
    let irq = Irq::default();
    queue.flush(&memory, &irq).unwrap();
    queue.flush(&memory, &irq).unwrap();
    assert_eq!(irq.queues[0].load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[test]
fn driver_has_at_most_as_many_chains_in_flight_as_the_queue_has_descriptors() {
    let (memory, mut driver, mut queue) = queue_without_device(SIZE);
    let head = driver.add(&[b"request"], &[]);
    for _ in 1..SIZE {
        assert_eq!(queue.pop(&memory).unwrap().unwrap().head, head);
        driver.offer(head);
    }
    queue.pop(&memory).unwrap().unwrap();
    assert!(queue.pop(&memory).unwrap().is_none());
    driver.offer(head);
    assert!(matches!(queue.pop_any(&memory), Err(QueueFault::TooManyChains(0))));
    // A chain that was returned, or whose pop was undone, is not in flight.
    let (memory, mut driver, mut queue) = queue_without_device(SIZE);
    driver.add(&[b"request"], &[]);
    for _ in 0..3 * SIZE {
        queue.pop(&memory).unwrap().unwrap();
        queue.undo_pop();
        queue.pop(&memory).unwrap().unwrap();
        queue.push(&memory, head, 0).unwrap();
        driver.offer(head);
    }
}

#[test]
fn invalid_chains_are_returned_unused() {
    let (memory, mut driver, mut queue) = queue_without_device(SIZE);
    driver.write_descriptor(0, MEMORY - 1, 2, 0, 0);
    driver.write_descriptor(1, u64::MAX, 1, WRITE, 0);
    driver.write_descriptor(2, 0, 1, WRITE | NEXT, 3);
    driver.write_descriptor(3, 0, 1, 0, 0);
    driver.write_descriptor(4, 0, 1, NEXT, 4);
    driver.write_descriptor(7, MEMORY - 1, 1, 0, 0);
    for head in [0, 1, 2, 7, 4] {
        driver.offer(head);
    }
    let chain = queue.pop(&memory).unwrap().unwrap();
    assert_eq!((chain.head, chain.readable.len()), (7, 1));
    for head in [0, 1, 2] {
        assert_eq!(driver.poll(), Some((head, vec![])));
    }
    // A chain without an end has as many segments as the queue has descriptors.
    let chain = queue.pop(&memory).unwrap().unwrap();
    assert_eq!((chain.head, chain.readable.len()), (4, SIZE.into()));
    driver.offer(2);
    let chain = queue.pop_any(&memory).unwrap().unwrap();
    assert!(chain.head == 2 && chain.readable.is_empty() && chain.writable.is_empty());
    driver.set_avail_index(SIZE * 4);
    assert!(matches!(queue.pop(&memory), Err(QueueFault::Ring(0, _))));
}

/// A descriptor: address, length, flags and the next descriptor. Most of its addresses are in guest memory.
type Descriptor = (u64, u32, u16, u16);

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![8 => 0..MEMORY + 64, 1 => any::<u64>()];
    let len = prop_oneof![8 => 0u32..300, 1 => any::<u32>()];
    let flags =
        prop_oneof![4 => 0..NEXT | WRITE | INDIRECT, 4 => Just(NEXT), 4 => Just(NEXT | WRITE), 1 => any::<u16>()];
    (address, len, flags, 0..SIZE + 1)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 16 } else { 512 }))]

    #[test]
    fn any_descriptors_and_rings_stay_within_guest_memory(
        table in prop::collection::vec(descriptor(), usize::from(SIZE)),
        heads in prop::collection::vec(0..SIZE + 1, 1..9),
        skip: u8,
        truncate: u8,
    ) {
        let (memory, mut driver, mut queue) = queue_without_device(SIZE);
        for (index, (address, len, flags, next)) in (0..).zip(table) {
            driver.write_descriptor(index, address, len, flags, next);
        }
        for head in &heads {
            driver.offer(*head);
        }
        // A device can write to the rings, because the driver chooses all addresses. Therefore the number of chains is
        // limited here.
        for _ in 0..2 * SIZE {
            let Ok(Some(mut chain)) = queue.pop(&memory) else { break };
            let all = chain.readable.len();
            let mut bytes = vec![0; all.min(1 << 12)];
            prop_assert_eq!(chain.readable.copy_to(&mut bytes), bytes.len());
            chain.readable.skip(skip.into());
            prop_assert_eq!(chain.readable.len(), all.saturating_sub(skip.into()));
            let all = chain.writable.len();
            chain.writable.skip(skip.into());
            chain.writable.truncate(truncate.into());
            let space = all.saturating_sub(skip.into()).min(truncate.into());
            prop_assert_eq!(chain.writable.copy_from(&[7; 256]), space);
            let sum: usize = chain.writable.as_slice().iter().map(|part| part.iov_len).sum();
            prop_assert_eq!(sum, space);
            let head = chain.head;
            if queue.push(&memory, head, 0).is_err() {
                break;
            }
        }
    }
}
