//! Tests of requests that a vCPU changes in guest memory while the device serves these requests. This module also tests
//! FORGET and BATCH_FORGET.

use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::test_guest::*;
use crate::guest_memory::GuestMemory;

/// Number of requests per test. A former version of the device read the opcode twice. In tests of that version, the
/// opcode changed between the two reads in 1 of 40 to 1 of 1500 requests.
const ATTEMPTS: usize = 2000;
/// Offset of the opcode in `struct fuse_in_header`.
const OPCODE: u64 = 4;
const INDIRECT: u16 = 4;
/// Index of a descriptor that `Driver::add` does not use in these tests.
const HEAD: u16 = 100;

/// Calls `serve` while another thread alternately writes two values to an address of guest memory.
fn while_flipping(memory: &GuestMemory, address: u64, values: [u32; 2], serve: impl FnOnce()) {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = Stop(&done);
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for value in values {
                    memory.store(value, GuestAddress(address), Ordering::Relaxed).unwrap();
                }
            }
        });
        serve();
    });
}

#[test]
fn high_priority_queue_does_not_serve_mkdir_that_replaces_forget() {
    let root = tempfile::tempdir().unwrap();
    let mut guest = Guest::with_share(root.path(), 1);
    guest.init();
    let memory = guest.bench.memory.clone();
    // This body fits both opcodes: MKDIR of "escaped" with mode 0, and FORGET of 0 references.
    let body = [words([0, 0]), b"escaped\0".to_vec()].concat();
    let request = [guest.header(FORGET, ROOT, body.len()), body].concat();
    // The first descriptor is free again after each request. Therefore, all requests have the same head.
    let head = guest.bench.queues[0].add(&[&request], &[]);
    guest.bench.run();
    let opcode = guest.bench.queues[0].buffer(head) + OPCODE;
    while_flipping(&memory, opcode, [FORGET, MKDIR], || {
        for attempt in 0..ATTEMPTS {
            assert_eq!(guest.bench.queues[0].poll(), Some((head, Vec::new())));
            assert!(!root.path().join("escaped").exists(), "the high-priority queue served MKDIR in request {attempt}");
            assert_eq!(guest.bench.queues[0].add(&[&request], &[]), head);
            guest.bench.run();
        }
    });
}

/// READ needs an answer buffer. The request has no answer buffer, because FORGET has no answer.
#[test]
fn device_does_not_panic_if_read_replaces_forget() {
    let mut guest = Guest::new(1);
    guest.init();
    let memory = guest.bench.memory.clone();
    let request = [guest.header(FORGET, ROOT, 40), vec![0; 40]].concat();
    let head = guest.bench.queues[1].add(&[&request], &[]);
    let opcode = guest.bench.queues[1].buffer(head) + OPCODE;
    while_flipping(&memory, opcode, [FORGET, READ], || {
        for _ in 0..ATTEMPTS {
            guest.bench.run_until(|queues| queues[1].poll().is_some());
            assert_eq!(guest.bench.queues[1].add(&[&request], &[]), head);
        }
        guest.bench.run_until(|queues| queues[1].poll().is_some());
    });
    guest.read_hello();
}

#[test]
fn device_reads_the_length_of_an_answer_descriptor_once() {
    let mut guest = Guest::new(1);
    guest.init();
    let memory = guest.bench.memory.clone();
    let request = [guest.header(READ, ROOT, 40), vec![0; 40]].concat();
    let queue = &guest.bench.queues[1];
    let (table, readable, writable) = (queue.buffer(HEAD), queue.buffer(HEAD + 1), queue.buffer(HEAD + 2));
    memory.write_slice(&request, GuestAddress(readable)).unwrap();
    // struct virtq_desc: address, length, flags (NEXT, WRITE) and the index of the next descriptor.
    let descriptors = [longs([readable]), words([request.len() as u32, 1 | 1 << 16])].concat();
    memory.write_slice(&[descriptors, longs([writable]), words([64, 2])].concat(), GuestAddress(table)).unwrap();
    queue.write_descriptor(HEAD, table, 32, INDIRECT, 0);
    while_flipping(&memory, table + 16 + 8, [64, 8], || {
        for _ in 0..ATTEMPTS {
            guest.bench.queues[1].offer(HEAD);
            guest.bench.run_until(|queues| queues[1].poll().is_some());
        }
    });
    guest.read_hello();
}

#[test]
fn batch_forget_with_a_wrong_count_forgets_no_node() {
    let mut guest = Guest::new(1);
    guest.init();
    let node = guest.lookup(ROOT, "hello");
    let forget = |guest: &mut Guest, queue: usize, count: u32| {
        let body = [words([count, 0]), longs([node, 1])].concat();
        let header = guest.header(BATCH_FORGET, 0, body.len());
        guest.bench.queues[queue].add(&[&header, &body], &[]);
        guest.bench.run_until(|queues| queues[queue].poll().is_some());
        guest.error(OPEN, node, &words([0, 0]))
    };
    for count in [0, 2, 3, 4096, 65536, 1 << 28, u32::MAX] {
        for queue in [0, 1] {
            let error = forget(&mut guest, queue, count);
            assert_eq!(error, 0, "BATCH_FORGET with count {count} in queue {queue} must not forget the node");
        }
    }
    assert_eq!(forget(&mut guest, 0, 1), libc::EBADF);
}

#[test]
fn forget_and_batch_forget_work_in_both_queues() {
    let mut guest = Guest::new(1);
    guest.init();
    for queue in [0, 1] {
        for (opcode, lookups) in [(FORGET, 1), (FORGET, 3), (BATCH_FORGET, 1), (BATCH_FORGET, 2)] {
            let node = (0..lookups).fold(0, |_, _| guest.lookup(ROOT, "hello"));
            let body = match opcode {
                FORGET => longs([lookups]),
                // The node of the first entry does not exist.
                _ => {
                    let entries = longs([node + 1, 1]).into_iter().chain(longs([node, lookups]));
                    words([2, 0]).into_iter().chain(entries).collect()
                }
            };
            let header = guest.header(opcode, node, body.len());
            guest.bench.queues[queue].add(&[&header, &body], &[]);
            guest.bench.run_until(|queues| queues[queue].poll().is_some());
            let error = guest.error(OPEN, node, &words([0, 0]));
            assert_eq!(error, libc::EBADF, "opcode {opcode} in queue {queue} must forget the node");
        }
    }
}

#[test]
fn forget_with_incomplete_arguments_is_ignored() {
    let mut guest = Guest::new(1);
    guest.init();
    let node = guest.lookup(ROOT, "hello");
    for queue in [0, 1] {
        for (opcode, body) in [(FORGET, 0), (FORGET, 7), (BATCH_FORGET, 0), (BATCH_FORGET, 7), (INTERRUPT, 0)] {
            for writable in [&[][..], &[8], &[16, 64]] {
                let header = guest.header(opcode, node, body);
                guest.bench.queues[queue].add(&[&header, &vec![1; body]], writable);
                let mut answer = None;
                guest.bench.run_until(|queues| {
                    answer = queues[queue].poll();
                    answer.is_some()
                });
                assert_eq!(answer.unwrap().1, b"", "opcode {opcode} in queue {queue} must have no answer");
            }
        }
    }
    assert_eq!(guest.error(OPEN, node, &words([0, 0])), 0);
}
