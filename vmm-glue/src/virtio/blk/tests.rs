//! Tests of disk requests on a temporary file.

use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;
use crate::virtio::testing::Bench;

const SECTORS: usize = 64;
pub const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

pub fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

pub fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(count.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

fn disk(read_only: bool) -> (File, Bench<Blk>) {
    limited_disk(read_only, RateLimit::default())
}

pub fn limited_disk(read_only: bool, rate_limit: RateLimit) -> (File, Bench<Blk>) {
    let file = tempfile::tempfile().unwrap();
    let content: Vec<u8> = (0..SECTORS * 512).map(|at| (at / 512 + 1) as u8).collect();
    file.write_all_at(&content, 0).unwrap();
    file.write_all_at(b"not a whole sector", (SECTORS * 512) as u64).unwrap();
    let mut bench = Bench::new(Blk::new(file.try_clone().unwrap(), read_only, "serial-1", rate_limit).unwrap());
    bench.activate(0);
    (file, bench)
}

pub fn call(bench: &mut Bench<Blk>, readable: &[&[u8]], writable: &[usize]) -> Vec<u8> {
    bench.queues[0].add(readable, writable);
    let mut answer = None;
    bench.run_until(|queues| {
        answer = queues[0].poll();
        answer.is_some()
    });
    answer.unwrap().1
}

#[test]
fn disk_serves_read_write_flush_and_get_id() {
    let (file, mut bench) = disk(false);
    let bytes = call(&mut bench, &[&header(IN, 2)], &[100, 924, 1]);
    assert_eq!((bytes[0], bytes[512], bytes[1024], bytes.len()), (3, 4, 0, 1025));
    // Header and data are in one descriptor, and the status is the last byte of another descriptor.
    let mut request = header(OUT, 63);
    request.extend([9; 300]);
    assert_eq!(call(&mut bench, &[&request, &[9; 212]], &[1]), [0]);
    let mut sector = [0; 512];
    file.read_exact_at(&mut sector, 63 * 512).unwrap();
    assert_eq!(sector, [9; 512]);
    assert_eq!(call(&mut bench, &[&header(FLUSH, 0)], &[1]), [0]);
    let id = call(&mut bench, &[&header(GET_ID, 0)], &[20, 1]);
    assert_eq!(&id[..9], b"serial-1\0");
    assert_eq!((id.len(), id[20]), (21, 0));
}

#[test]
fn flush_reaches_the_host_and_its_failure_reaches_the_guest() {
    const IO_ERROR: u8 = 1;
    // The kernel refuses fdatasync(2) for this device. An answer without a call of fdatasync would be a success.
    let file = File::options().read(true).write(true).open("/dev/null").unwrap();
    let mut bench = Bench::new(Blk::new(file, false, "null", RateLimit::default()).unwrap());
    assert_ne!(bench.lock().features() & 1 << VIRTIO_BLK_F_FLUSH, 0);
    bench.activate(0);
    assert_eq!(call(&mut bench, &[&header(FLUSH, 0)], &[1]), [IO_ERROR]);
}

#[test]
fn discard_and_write_zeroes_clear_only_the_given_sectors() {
    let (file, mut bench) = disk(false);
    let ranges = [range(1, 2, 0), range(8, 8, 0)].concat();
    assert_eq!(call(&mut bench, &[&header(DISCARD, 0), &ranges], &[1]), [0]);
    assert_eq!(call(&mut bench, &[&header(WRITE_ZEROES, 0), &range(20, 1, 1)], &[1]), [0]);
    assert_eq!(call(&mut bench, &[&header(WRITE_ZEROES, 0), &range(22, 1, 0)], &[1]), [0]);
    let mut bytes = [0; 32 * 512];
    file.read_exact_at(&mut bytes, 0).unwrap();
    for (sector, part) in bytes.chunks(512).enumerate() {
        let zeroed = matches!(sector, 1 | 2 | 8..=15 | 20 | 22);
        assert_eq!(part[0], if zeroed { 0 } else { sector as u8 + 1 }, "wrong content of sector {sector}");
    }
    for invalid in
        [range(63, 2, 0), range(u64::MAX, 1, 0), range(0, u32::MAX, 0), vec![0; 15], vec![], vec![0; 17 * 16]]
    {
        assert_eq!(call(&mut bench, &[&header(DISCARD, 0), &invalid], &[1]), [1]);
    }
}

#[test]
fn invalid_requests_fail() {
    let (file, mut bench) = disk(true);
    assert_eq!(call(&mut bench, &[&header(OUT, 0), &[0; 512]], &[1]), [1]);
    assert_eq!(call(&mut bench, &[&header(DISCARD, 0), &range(0, 1, 0)], &[1]), [1]);
    assert_eq!(call(&mut bench, &[&header(99, 0)], &[1]), [2]);
    for (sector, length) in [(64, 512), (63, 1024), (u64::MAX, 512), (u64::MAX / 512 + 1, 512), (0, 511)] {
        // If a read fails, only the status counts as written.
        bench.queues[0].add(&[&header(IN, sector)], &[length, 1]);
        let mut status = None;
        bench.run_until(|queues| {
            status = queues[0].poll();
            status.is_some()
        });
        assert_eq!(status.unwrap().1.len(), 1, "a read of {length} bytes at sector {sector} must fail");
    }
    assert_eq!(call(&mut bench, &[&header(IN, 0)[..10]], &[1]), [1]);
    assert_eq!(call(&mut bench, &[&header(IN, 0)], &[]), [0u8; 0]);
    let mut sector = [0; 1];
    file.read_exact_at(&mut sector, 0).unwrap();
    assert_eq!(sector, [1]);
}

#[test]
fn read_beyond_shrunk_file_fails_and_pause_stops_requests() {
    let (file, mut bench) = disk(false);
    file.set_len(512).unwrap();
    assert_eq!(call(&mut bench, &[&header(IN, 10)], &[512, 1]).len(), 1);
    bench.lock().pause();
    bench.queues[0].add(&[&header(IN, 0)], &[512, 1]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(bench.queues[0].poll().is_none());
    bench.lock().resume();
    bench.run_until(|queues| queues[0].poll().is_some());
    bench.lock().reset();
    bench.activate(0);
    assert_eq!(call(&mut bench, &[&header(IN, 0)], &[512, 1]).len(), 513);
}

#[test]
fn configuration_space_has_size_and_limits() {
    let (_, bench) = disk(false);
    let mut config = [0; 64];
    bench.lock().read_config(0, &mut config);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4), word(12), word(20)), (SECTORS as u32, 0, 126, 512));
    assert_eq!((word(36), word(40), word(44), word(48), word(52), config[56]), (131072, 16, 1, 131072, 16, 1));
    assert!(Blk::new(tempfile::tempfile().unwrap(), false, "a serial that is too long", RateLimit::default()).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn hostile_requests_do_not_resize_the_file(requests in proptest::collection::vec(
        (0u32..16, any::<u64>(), 0u64..80, any::<bool>(), proptest::collection::vec(any::<u8>(), 0..1100),
         proptest::collection::vec(0usize..1500, 0..4)), 1..12)) {
        let (file, mut bench) = disk(false);
        for (kind, far, near, is_near, data, writable) in requests {
            call(&mut bench, &[&header(kind, if is_near { near } else { far }), &data], &writable);
        }
        prop_assert_eq!(file.metadata().unwrap().len(), (SECTORS * 512 + 18) as u64);
    }
}
