//! Tests from the driver's side. Valid requests must be served within the limits, and all other requests must be
//! rejected.

use std::sync::Mutex;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::request::ANSWER_LEN;
use super::*;
use crate::memory::hotplug;
use crate::virtio::testing::Bench;

const START: u64 = 4 << 30;
const LEN: u64 = 256 << 20;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: Option<(u8, u8)> = Some((0, 0));
const NACK: Option<(u8, u8)> = Some((1, 0));
const ERROR: Option<(u8, u8)> = Some((3, 0));

fn bench() -> Bench<Mem> {
    let ram = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let (_, range) = hotplug::reserve(&ram, (START, LEN), hotplug::Backing::Ordinary).unwrap();
    let mut bench = Bench::new(Mem::new(range).unwrap());
    bench.activate(0);
    bench
}

fn encode(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let mut bytes = vec![0; REQUEST_LEN];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

/// Returns the type and state of the response, or `None` if there is no response.
fn send(bench: &mut Bench<Mem>, request: &[u8]) -> Option<(u8, u8)> {
    bench.queues[0].add(&[request], &[ANSWER_LEN]);
    bench.run();
    let (_, answer) = bench.queues[0].poll().unwrap();
    (answer.len() == ANSWER_LEN).then(|| (answer[0], answer[8]))
}

fn driver_request(bench: &mut Bench<Mem>, kind: u16, block: u64, count: u16) -> Option<(u8, u8)> {
    send(bench, &encode(kind, START + block * BLOCK, count))
}

fn config(bench: &Bench<Mem>) -> Vec<u64> {
    let mut bytes = [0; 56];
    bench.lock().read_config(0, &mut bytes);
    bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

fn request(bench: &Bench<Mem>, blocks: u64) -> Arc<Mutex<Option<u64>>> {
    let reached = Arc::new(Mutex::new(None));
    let sender = reached.clone();
    bench.lock().request(blocks * BLOCK, Box::new(move |bytes| *sender.lock().unwrap() = Some(bytes))).unwrap();
    reached
}

#[test]
fn guest_plugs_and_unplugs_up_to_requested_size() {
    let mut bench = bench();
    assert_eq!(driver_request(&mut bench, PLUG, 0, 1), ERROR, "plugging must fail while the requested size is 0");
    let reached = request(&bench, 4);
    assert_eq!(bench.irq.config.load(Ordering::SeqCst), 1);
    assert_eq!(config(&bench), [BLOCK, 0, START, LEN, LEN, 0, 4 * BLOCK]);
    assert_eq!(driver_request(&mut bench, PLUG, 0, 3), ACK);
    assert_eq!(*reached.lock().unwrap(), None);
    assert_eq!(driver_request(&mut bench, STATE, 0, 3), Some((0, 0)));
    assert_eq!(driver_request(&mut bench, STATE, 3, 1), Some((0, 1)));
    assert_eq!(driver_request(&mut bench, STATE, 0, 4), Some((0, 2)));
    assert_eq!(driver_request(&mut bench, PLUG, 3, 1), ACK);
    assert_eq!(*reached.lock().unwrap(), Some(4 * BLOCK));
    assert_eq!(config(&bench)[5], 4 * BLOCK);
    // The guest cannot plug more than the requested size, a block outside of the region, or a plugged block.
    assert_eq!(driver_request(&mut bench, PLUG, 4, 1), NACK);
    assert_eq!(driver_request(&mut bench, PLUG, LEN / BLOCK, 1), ERROR);
    assert_eq!(driver_request(&mut bench, PLUG, 0, 1), ERROR);
    // A smaller requested size does not shrink the usable region, but no more blocks can be plugged in this region.
    let reached = request(&bench, 1);
    assert_eq!(driver_request(&mut bench, UNPLUG, 0, 2), ACK);
    assert_eq!(driver_request(&mut bench, UNPLUG, 0, 1), ERROR, "unplugging must fail if a block is not plugged");
    assert_eq!(driver_request(&mut bench, PLUG, 0, 1), NACK);
    assert_eq!(*reached.lock().unwrap(), None);
    assert_eq!(driver_request(&mut bench, UNPLUG, 2, 1), ACK);
    assert_eq!(*reached.lock().unwrap(), Some(BLOCK));
    assert_eq!(driver_request(&mut bench, UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(config(&bench)[4..], [LEN, 0, BLOCK]);
}

#[test]
fn new_request_completes_the_previous_one() {
    let mut bench = bench();
    let first = request(&bench, 8);
    assert_eq!(driver_request(&mut bench, PLUG, 0, 2), ACK);
    let second = request(&bench, 2);
    assert_eq!((*first.lock().unwrap(), *second.lock().unwrap()), (Some(2 * BLOCK), Some(2 * BLOCK)));
    // A request for more than the whole range is limited to the range.
    request(&bench, 1 << 40);
    assert_eq!(config(&bench)[6], LEN);
    // Plugged blocks survive the driver's reset.
    bench.lock().reset();
    bench.activate(0);
    assert_eq!(driver_request(&mut bench, STATE, 0, 2), Some((0, 0)));
}

#[test]
fn driver_is_interrupted_for_size_that_was_requested_before_activation() {
    let mut bench = bench();
    bench.lock().reset();
    request(&bench, 1);
    for _ in 0..2 {
        bench.activate(0);
        assert_eq!(bench.irq.config.load(Ordering::SeqCst), 1);
        bench.lock().reset();
        bench.run();
    }
}

#[test]
fn invalid_requests_are_rejected() {
    let mut bench = bench();
    request(&bench, 4);
    assert_eq!(send(&mut bench, &encode(PLUG, START + 4096, 1)), ERROR);
    assert_eq!(send(&mut bench, &encode(PLUG, START - BLOCK, 1)), ERROR);
    assert_eq!(send(&mut bench, &encode(PLUG, u64::MAX - BLOCK + 1, u16::MAX)), ERROR);
    assert_eq!(send(&mut bench, &encode(PLUG, START, 0)), ERROR);
    assert_eq!(send(&mut bench, &encode(7, START, 1)), ERROR);
    assert_eq!(send(&mut bench, &[0; 23]), ERROR);
    // If the chain is too short for the response, the request is served, but the response is not written.
    bench.queues[0].add(&[&encode(PLUG, START, 1)], &[ANSWER_LEN - 1]);
    bench.run();
    assert!(bench.queues[0].poll().unwrap().1.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn plugged_size_stays_within_requested_size(
        requests in proptest::collection::vec((0u16..5, 0u64..140, 0u16..140, any::<bool>()), 1..40),
        wanted in proptest::collection::vec(0u64..150, 1..4),
    ) {
        let mut bench = bench();
        let mut plugged = std::collections::HashSet::new();
        for (step, (kind, block, count, shift)) in requests.into_iter().enumerate() {
            let before = bench.lock().plugged();
            if step % 10 == 0 {
                request(&bench, wanted[step / 10 % wanted.len()]);
            }
            let requested = config(&bench)[6];
            let address = START + block * BLOCK + if shift { 4096 } else { 0 };
            let answer = send(&mut bench, &encode(kind, address, count));
            let range = block..block + u64::from(count);
            match (kind, answer) {
                (PLUG, ACK) => for block in range { prop_assert!(plugged.insert(block)); },
                (UNPLUG, ACK) => for block in range { prop_assert!(plugged.remove(&block)); },
                (UNPLUG_ALL, ACK) => plugged.clear(),
                _ => {}
            }
            let now = bench.lock().plugged();
            prop_assert_eq!(now, plugged.len() as u64 * BLOCK);
            prop_assert!(now <= requested.max(before) && plugged.iter().all(|block| block * BLOCK < LEN));
        }
    }

    #[test]
    fn parse_does_not_panic_on_any_bytes(bytes: [u8; REQUEST_LEN]) {
        let _ = Request::parse(&bytes);
    }
}
