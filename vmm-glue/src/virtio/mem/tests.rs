//! The driver's side: what is asked is carried out within bounds, and nothing else is.

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

/// Type and state of the answer; none when there was none.
fn send(bench: &mut Bench<Mem>, request: &[u8]) -> Option<(u8, u8)> {
    bench.queues[0].add(&[request], &[ANSWER_LEN]);
    bench.run();
    let (_, answer) = bench.queues[0].poll().unwrap();
    (answer.len() == ANSWER_LEN).then(|| (answer[0], answer[8]))
}

fn ask(bench: &mut Bench<Mem>, kind: u16, block: u64, count: u16) -> Option<(u8, u8)> {
    send(bench, &encode(kind, START + block * BLOCK, count))
}

fn config(bench: &Bench<Mem>) -> Vec<u64> {
    let mut bytes = [0; 56];
    bench.lock().read_config(0, &mut bytes);
    bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

fn request(bench: &Bench<Mem>, blocks: u64) -> Arc<Mutex<Option<u64>>> {
    let told = Arc::new(Mutex::new(None));
    let note = told.clone();
    bench.lock().request(blocks * BLOCK, Box::new(move |bytes| *note.lock().unwrap() = Some(bytes))).unwrap();
    told
}

#[test]
fn a_guest_grows_and_shrinks_as_asked() {
    let mut bench = bench();
    assert_eq!(ask(&mut bench, PLUG, 0, 1), ERROR, "nothing was asked for");
    let told = request(&bench, 4);
    assert_eq!(bench.irq.config.load(Ordering::SeqCst), 1);
    assert_eq!(config(&bench), [BLOCK, 0, START, LEN, LEN, 0, 4 * BLOCK]);
    assert_eq!(ask(&mut bench, PLUG, 0, 3), ACK);
    assert_eq!(*told.lock().unwrap(), None);
    assert_eq!(ask(&mut bench, STATE, 0, 3), Some((0, 0)));
    assert_eq!(ask(&mut bench, STATE, 3, 1), Some((0, 1)));
    assert_eq!(ask(&mut bench, STATE, 0, 4), Some((0, 2)));
    assert_eq!(ask(&mut bench, PLUG, 3, 1), ACK);
    assert_eq!(*told.lock().unwrap(), Some(4 * BLOCK));
    assert_eq!(config(&bench)[5], 4 * BLOCK);
    // Nothing beyond the end, nothing twice.
    assert_eq!(ask(&mut bench, PLUG, 4, 1), NACK);
    assert_eq!(ask(&mut bench, PLUG, LEN / BLOCK, 1), ERROR);
    assert_eq!(ask(&mut bench, PLUG, 0, 1), ERROR);
    // Less again: the usable part stays, but nothing more is plugged in it.
    let told = request(&bench, 1);
    assert_eq!(ask(&mut bench, UNPLUG, 0, 2), ACK);
    assert_eq!(ask(&mut bench, UNPLUG, 0, 1), ERROR, "it is not plugged");
    assert_eq!(ask(&mut bench, PLUG, 0, 1), NACK);
    assert_eq!(*told.lock().unwrap(), None);
    assert_eq!(ask(&mut bench, UNPLUG, 2, 1), ACK);
    assert_eq!(*told.lock().unwrap(), Some(BLOCK));
    assert_eq!(ask(&mut bench, UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(config(&bench)[4..], [LEN, 0, BLOCK]);
}

#[test]
fn a_new_request_ends_the_wait_for_the_one_before() {
    let mut bench = bench();
    let first = request(&bench, 8);
    assert_eq!(ask(&mut bench, PLUG, 0, 2), ACK);
    let second = request(&bench, 2);
    assert_eq!((*first.lock().unwrap(), *second.lock().unwrap()), (Some(2 * BLOCK), Some(2 * BLOCK)));
    // More than there is room for is all there is room for.
    request(&bench, 1 << 40);
    assert_eq!(config(&bench)[6], LEN);
    // What is plugged survives the driver's reset.
    bench.lock().reset();
    bench.activate(0);
    assert_eq!(ask(&mut bench, STATE, 0, 2), Some((0, 0)));
}

#[test]
fn requests_that_cannot_be_are_refused() {
    let mut bench = bench();
    request(&bench, 4);
    assert_eq!(send(&mut bench, &encode(PLUG, START + 4096, 1)), ERROR);
    assert_eq!(send(&mut bench, &encode(PLUG, START - BLOCK, 1)), ERROR);
    assert_eq!(send(&mut bench, &encode(PLUG, u64::MAX - BLOCK + 1, u16::MAX)), ERROR);
    assert_eq!(send(&mut bench, &encode(PLUG, START, 0)), ERROR);
    assert_eq!(send(&mut bench, &encode(7, START, 1)), ERROR);
    assert_eq!(send(&mut bench, &[0; 23]), ERROR);
    // No room for the answer: none is written, and the request was carried out.
    bench.queues[0].add(&[&encode(PLUG, START, 1)], &[ANSWER_LEN - 1]);
    bench.run();
    assert!(bench.queues[0].poll().unwrap().1.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn never_more_than_asked_for(
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
            let asked = config(&bench)[6];
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
            prop_assert!(now <= asked.max(before) && plugged.iter().all(|block| block * BLOCK < LEN));
        }
    }

    #[test]
    fn any_bytes_are_parsed(bytes: [u8; REQUEST_LEN]) {
        let _ = Request::parse(&bytes);
    }
}
