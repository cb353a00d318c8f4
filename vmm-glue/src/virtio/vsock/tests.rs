//! The connection machine against a scripted guest.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};

use proptest::prelude::*;

use super::connection::BUF_ALLOC;
use super::packet::{HEADER_LEN, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::*;
use crate::virtio::testing::Bench;

const CID: u64 = 3;
const ROOM: u32 = 128 * 1024;

/// A guest that does what a test says.
struct Guest {
    bench: Bench<Vsock>,
}

/// The guest's side of a connection.
#[derive(Clone, Copy)]
struct Side {
    host: u32,
    guest: u32,
}

impl Guest {
    fn new(without: u64) -> Self {
        let mut bench = Bench::new(Vsock::new(CID).unwrap());
        bench.activate(without);
        let mut this = Self { bench };
        this.refill(64);
        this
    }

    fn refill(&mut self, count: usize) {
        for _ in 0..count {
            if self.bench.queues[0].room() == 0 {
                break;
            }
            self.bench.queues[0].add(&[], &[4096]);
        }
        self.bench.run();
    }

    fn ask(&mut self, port: u32) -> Receiver<std::io::Result<OwnedFd>> {
        let (sender, receiver) = channel();
        self.bench.lock().connect(port, Box::new(move |result| sender.send(result).unwrap()));
        self.bench.run();
        receiver
    }

    /// Packets that came, their buffers made available again.
    fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.bench.run();
        let mut packets = Vec::new();
        while let Some((_, bytes)) = self.bench.queues[0].poll() {
            let (header, data) = bytes.split_at(HEADER_LEN);
            let header = Header::parse(header.try_into().unwrap());
            assert_eq!(header.len as usize, data.len());
            packets.push((header, data.to_vec()));
        }
        for _ in &packets {
            self.bench.queues[0].add(&[], &[4096]);
        }
        self.bench.run();
        packets
    }

    fn send_raw(&mut self, parts: &[&[u8]]) {
        while self.bench.queues[1].poll().is_some() {}
        self.bench.queues[1].add(parts, &[]);
        self.bench.run();
    }

    fn header(side: Side, op: Op) -> Header {
        Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: side.guest,
            dst_port: side.host,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: ROOM,
            fwd_cnt: 0,
        }
    }

    fn send(&mut self, side: Side, op: Op, flags: u32, fwd_cnt: u32, data: &[u8]) {
        let header = Header { flags, fwd_cnt, len: data.len() as u32, ..Self::header(side, op) };
        self.send_raw(&[&header.to_bytes(), data]);
    }

    fn open(&mut self, port: u32) -> (Side, UnixStream) {
        let reply = self.ask(port);
        let packets = self.packets();
        let (request, _) = packets[0];
        assert_eq!((packets.len(), request.op, request.dst_port), (1, Op::Request, port));
        assert_eq!((request.src_cid, request.dst_cid, request.buf_alloc), (2, CID, BUF_ALLOC));
        assert!(reply.try_recv().is_err(), "not before the guest has answered");
        let side = Side { host: request.src_port, guest: port };
        self.send(side, Op::Response, 0, 0, &[]);
        let stream = UnixStream::from(reply.try_recv().unwrap().unwrap());
        stream.set_nonblocking(true).unwrap();
        (side, stream)
    }

    fn ops(&mut self) -> Vec<Op> {
        self.packets().into_iter().map(|(header, _)| header.op).collect()
    }

    fn connections(&mut self) -> usize {
        self.bench.run();
        self.bench.lock().connections()
    }
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + at / 253 + seed) as u8).collect()
}

#[test]
fn connect_refused_and_accepted() {
    let mut guest = Guest::new(0);
    let reply = guest.ask(7);
    let (request, _) = guest.packets()[0];
    guest.send(Side { host: request.src_port, guest: 7 }, Op::Reset, 0, 0, &[]);
    assert_eq!(reply.try_recv().unwrap().unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(guest.connections(), 0);
    let (_side, _stream) = guest.open(8);
    assert_eq!(guest.connections(), 1);
}

#[test]
fn connect_waits_for_the_driver_and_for_buffers() {
    let mut bench = Bench::new(Vsock::new(CID).unwrap());
    let (sender, receiver) = channel();
    bench.lock().connect(5, Box::new(move |result| sender.send(result).unwrap()));
    bench.run();
    bench.activate(0);
    let mut guest = Guest { bench };
    assert!(guest.packets().is_empty());
    guest.refill(4);
    let (request, _) = guest.packets()[0];
    guest.send(Side { host: request.src_port, guest: 5 }, Op::Response, 0, 0, &[]);
    assert!(receiver.try_recv().unwrap().is_ok());
}

/// Both ways at once, more than any buffer holds, with a reader that is sometimes slow on each side.
fn transfer(without: u64) {
    let mut guest = Guest::new(without);
    let (side, mut stream) = guest.open(1024);
    let total = 3 * 1024 * 1024;
    let (down, up) = (pattern(total, 1), pattern(total, 2));
    let (mut written, mut got_down, mut taken) = (0, Vec::new(), 0_u32);
    let (mut sent, mut got_up, mut host_fwd) = (0_usize, Vec::new(), 0_u32);
    for turn in 0.. {
        assert!(turn < 100_000, "stuck: {} {} {} {}", written, got_down.len(), sent, got_up.len());
        if let Ok(count) = stream.write(&down[written..]) {
            written += count;
        }
        for (header, data) in guest.packets() {
            host_fwd = header.fwd_cnt;
            got_down.extend(data);
            if header.op == Op::CreditRequest {
                taken = got_down.len() as u32;
                guest.send(side, Op::CreditUpdate, 0, taken, &[]);
            }
        }
        assert!(got_down.len() as u32 - taken <= ROOM, "the guest's credit was exceeded");
        if turn % 3 == 0 {
            taken = got_down.len() as u32;
        }
        let credit = BUF_ALLOC as usize - (sent as u32).wrapping_sub(host_fwd) as usize;
        let count = credit.min(65536).min(total - sent);
        if count > 0 {
            guest.send(side, Op::ReadWrite, 0, taken, &up[sent..sent + count]);
            sent += count;
        } else if turn % 3 == 0 {
            guest.send(side, Op::CreditUpdate, 0, taken, &[]);
        }
        if turn % 2 == 0 {
            let mut buffer = vec![0; 100_000];
            if let Ok(count) = stream.read(&mut buffer) {
                got_up.extend_from_slice(&buffer[..count]);
            }
        }
        if got_down.len() == total && got_up.len() == total {
            break;
        }
    }
    assert!(got_down == down && got_up == up);
}

#[test]
fn data_both_ways() {
    transfer(0);
    transfer(1 << VIRTIO_RING_F_EVENT_IDX);
}

#[test]
fn no_credit_no_data() {
    let mut guest = Guest::new(0);
    let (side, mut stream) = guest.open(1);
    let mut written = 0;
    while let Ok(count) = stream.write(&[1; 50_000]) {
        written += count;
        guest.bench.run();
    }
    let mut got = 0;
    loop {
        let packets = guest.packets();
        if packets.is_empty() {
            break;
        }
        got += packets.iter().map(|(_, data)| data.len()).sum::<usize>();
        let requests = packets.iter().filter(|(header, _)| header.op == Op::CreditRequest).count();
        assert!(requests <= 1);
    }
    assert_eq!(got, ROOM as usize);
    guest.send(side, Op::CreditUpdate, 0, ROOM, &[]);
    let more: usize = guest.packets().iter().map(|(_, data)| data.len()).sum();
    assert!(more > 0 && written > ROOM as usize);
}

#[test]
fn a_slow_reader_holds_nobody_else_up() {
    let mut guest = Guest::new(0);
    let (slow, mut slow_stream) = guest.open(1);
    let (quick, mut quick_stream) = guest.open(2);
    let mut sent = 0;
    let data = pattern(BUF_ALLOC as usize * 2, 0);
    let mut fwd = 0;
    // Fills the socket, then our buffer, to the last byte of credit.
    loop {
        fwd = guest.packets().iter().map(|(header, _)| header.fwd_cnt).max().unwrap_or(fwd).max(fwd);
        let credit = (BUF_ALLOC - (sent as u32 - fwd)) as usize;
        if credit == 0 {
            break;
        }
        let count = credit.min(60_000);
        guest.send(slow, Op::ReadWrite, 0, 0, &data[sent..sent + count]);
        sent += count;
    }
    guest.send(quick, Op::ReadWrite, 0, 0, b"hello");
    let mut buffer = [0; 16];
    assert_eq!(quick_stream.read(&mut buffer).unwrap(), 5);
    // The guest closes; all it sent arrives all the same, then the end.
    guest.send(slow, Op::Shutdown, SHUTDOWN_BOTH, 0, &[]);
    guest.send(slow, Op::Reset, 0, 0, &[]);
    let mut got = Vec::new();
    let mut part = vec![0; 30_000];
    loop {
        match slow_stream.read(&mut part) {
            Ok(0) => break,
            Ok(count) => got.extend_from_slice(&part[..count]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        guest.bench.run();
    }
    assert!(got == data[..sent]);
    assert_eq!(guest.connections(), 1);
}

#[test]
fn more_than_its_credit_ends_the_connection() {
    let mut guest = Guest::new(0);
    let (side, _stream) = guest.open(1);
    for _ in 0..20 {
        guest.send(side, Op::ReadWrite, 0, 0, &[0; 65536]);
    }
    assert!(guest.ops().contains(&Op::Reset));
    assert_eq!(guest.connections(), 0);
}

#[test]
fn half_close_from_the_host() {
    let mut guest = Guest::new(0);
    let (side, mut stream) = guest.open(1);
    stream.write_all(b"last words").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let packets = guest.packets();
    assert_eq!(packets[0].1, b"last words");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (Op::Shutdown, SHUTDOWN_SEND));
    assert_eq!(packets.len(), 2);
    guest.send(side, Op::ReadWrite, 0, 10, b"answer");
    let mut buffer = [0; 16];
    assert_eq!(stream.read(&mut buffer).unwrap(), 6);
    // The other half goes when the socket does.
    drop(stream);
    let packets = guest.packets();
    assert_eq!((packets[0].0.op, packets[0].0.flags), (Op::Shutdown, SHUTDOWN_BOTH));
    guest.send(side, Op::Reset, 0, 10, &[]);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn half_close_from_the_guest() {
    let mut guest = Guest::new(0);
    let (side, mut stream) = guest.open(1);
    guest.send(side, Op::ReadWrite, 0, 0, b"bye");
    guest.send(side, Op::Shutdown, SHUTDOWN_SEND, 0, &[]);
    let mut buffer = [0; 16];
    assert_eq!(stream.read(&mut buffer).unwrap(), 3);
    assert_eq!(stream.read(&mut buffer).unwrap(), 0);
    stream.write_all(b"still here").unwrap();
    assert_eq!(guest.packets()[0].1, b"still here");
    guest.send(side, Op::Shutdown, SHUTDOWN_RECEIVE, 10, &[]);
    assert_eq!(guest.ops(), [Op::Reset]);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn closing_with_unread_data_is_the_end_of_the_stream_not_an_error() {
    let mut guest = Guest::new(0);
    // No buffer, so that what the host wrote stays unread.
    let (side, mut stream) = guest.open(1);
    guest.send(Side { ..side }, Op::CreditUpdate, 0, 0u32.wrapping_sub(ROOM), &[]);
    stream.write_all(b"never read").unwrap();
    guest.bench.run();
    guest.send(side, Op::Shutdown, SHUTDOWN_BOTH, 0, &[]);
    guest.packets();
    assert_eq!(stream.read(&mut [0; 4]).unwrap(), 0);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn the_host_closes() {
    let mut guest = Guest::new(0);
    let (side, stream) = guest.open(1);
    drop(stream);
    let packets = guest.packets();
    assert_eq!((packets[0].0.op, packets[0].0.flags), (Op::Shutdown, SHUTDOWN_BOTH));
    guest.send(side, Op::ReadWrite, 0, 0, b"into the void");
    guest.send(side, Op::Reset, 0, 0, &[]);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn packets_of_no_connection() {
    let mut guest = Guest::new(0);
    let (side, _stream) = guest.open(1);
    let nobody = Side { host: 77, guest: 88 };
    guest.send(nobody, Op::Request, 0, 0, &[]);
    let packets = guest.packets();
    assert_eq!((packets[0].0.op, packets[0].0.dst_port, packets[0].0.src_port), (Op::Reset, 88, 77));
    guest.send(nobody, Op::Reset, 0, 0, &[]);
    guest.send(Side { guest: 2, ..side }, Op::ReadWrite, 0, 0, b"forged");
    assert_eq!(guest.ops(), [Op::Reset]);
    let header = Header { src_cid: 9, ..Guest::header(side, Op::Reset) };
    guest.send_raw(&[&header.to_bytes()]);
    assert_eq!((guest.ops(), guest.connections()), (vec![], 1));
}

#[test]
fn hostile_lengths() {
    for (len, sent) in [(5, 4), (u32::MAX, 0), (65537, 65537), (1, 0)] {
        let mut guest = Guest::new(0);
        let (side, _stream) = guest.open(1);
        let header = Header { len, ..Guest::header(side, Op::ReadWrite) };
        guest.send_raw(&[&header.to_bytes(), &vec![0; sent]]);
        assert_eq!(guest.ops(), [Op::Reset], "{len} {sent}");
        assert_eq!(guest.connections(), 0);
    }
    let mut guest = Guest::new(0);
    guest.send_raw(&[&[1; HEADER_LEN - 1]]);
    guest.bench.queues[0].add(&[], &[HEADER_LEN]);
    let (_, _stream) = guest.open(3);
}

#[test]
fn a_header_in_pieces_and_a_payload_in_more() {
    let mut guest = Guest::new(0);
    let (side, mut stream) = guest.open(1);
    let header = Header { len: 6, ..Guest::header(side, Op::ReadWrite) }.to_bytes();
    guest.send_raw(&[&header[..20], &header[20..], b"ab", b"cd", b"efgh"]);
    let mut buffer = [0; 16];
    assert_eq!(stream.read(&mut buffer).unwrap(), 6);
    assert_eq!(&buffer[..6], b"abcdef");
}

#[test]
fn many_refusals_without_buffers_stop_nothing_for_ever() {
    let mut bench = Bench::new(Vsock::new(CID).unwrap());
    bench.activate(0);
    let mut guest = Guest { bench };
    for port in 0..100 {
        guest.bench.queues[1].add(&[&Guest::header(Side { host: 1, guest: port }, Op::Request).to_bytes()], &[]);
    }
    guest.bench.run();
    guest.refill(120);
    let mut resets = 0;
    for _ in 0..4 {
        resets += guest.packets().len();
    }
    assert_eq!(resets, 100);
}

#[test]
fn a_broken_ring_stops_the_device_until_reset() {
    let mut guest = Guest::new(0);
    let (_, mut stream) = guest.open(1);
    guest.bench.queues[1].set_avail_index(40_000);
    guest.bench.run();
    assert_eq!(guest.bench.irq.needs_reset.load(Ordering::SeqCst), 1);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    guest.bench.lock().reset();
    guest.bench.activate(0);
    guest.refill(8);
    guest.open(2);
}

#[test]
fn reset_while_connecting_and_again() {
    let mut guest = Guest::new(0);
    for round in 0..20 {
        let (_side, mut stream) = guest.open(round);
        let reply = guest.ask(round);
        guest.bench.lock().reset();
        assert_eq!(reply.try_recv().unwrap().unwrap_err().kind(), ErrorKind::ConnectionReset);
        guest.bench.activate(0);
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
        guest.refill(16);
    }
}

#[test]
fn two_hundred_quick_connections_and_one_interrupt_a_turn() {
    let mut guest = Guest::new(1 << VIRTIO_RING_F_EVENT_IDX);
    for round in 0..200 {
        let (side, mut stream) = guest.open(1025);
        stream.write_all(&[round as u8; 100]).unwrap();
        assert_eq!(guest.packets()[0].1, [round as u8; 100]);
        guest.send(side, Op::Shutdown, SHUTDOWN_BOTH, 0, &[]);
        assert_eq!(guest.ops(), [Op::Reset]);
    }
    assert_eq!(guest.connections(), 0);
    let (_, mut stream) = guest.open(1);
    let before = guest.bench.irq.queues[0].load(Ordering::SeqCst);
    stream.write_all(&[0; 40_000]).unwrap();
    guest.bench.run();
    assert_eq!(guest.bench.irq.queues[0].load(Ordering::SeqCst) - before, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn header_round_trip(bytes: [u8; 32], more: [u8; 12]) {
        let mut all = [0; HEADER_LEN];
        all[..32].copy_from_slice(&bytes);
        all[32..].copy_from_slice(&more);
        prop_assert_eq!(Header::parse(&all).to_bytes(), all);
    }

    /// Whatever the guest sends to a connection, nothing panics and the device goes on or asks for a reset.
    #[test]
    fn hostile_packets(packets in proptest::collection::vec(
        (0u16..9, any::<u32>(), any::<u32>(), any::<u32>(), 0u32..70_000, 0usize..3000, any::<bool>()), 1..40)) {
        let mut guest = Guest::new(0);
        let (side, mut stream) = guest.open(1);
        for (op, flags, buf_alloc, fwd_cnt, len, real, honest) in packets {
            let header = Header {
                op: op.into(), flags, buf_alloc, fwd_cnt,
                len: if honest { real as u32 } else { len },
                ..Guest::header(side, Op::Reset)
            };
            guest.send_raw(&[&header.to_bytes(), &vec![7; real]]);
            let _ = stream.write(&[1; 1000]);
            let _ = stream.read(&mut [0; 500]);
            guest.packets();
        }
    }

    /// Whatever is in the descriptors, the device does not panic and comes to rest.
    #[test]
    fn hostile_descriptors(
        queue in 0usize..3,
        descriptors in proptest::collection::vec((any::<u64>(), any::<u32>(), 0u16..8, any::<u16>()), 8),
        near in any::<bool>(),
        heads in proptest::collection::vec(0u16..200, 1..20),
    ) {
        let mut guest = Guest::new(0);
        let queue = if queue == 0 { 1 } else { queue };
        for (index, &(address, len, flags, next)) in descriptors.iter().enumerate() {
            let (address, len) = if near { (address % (96 << 20), len % 100_000) } else { (address, len) };
            guest.bench.queues[queue].write_descriptor(index as u16, address, len, flags, next % 16);
        }
        let heads: Vec<u16> = heads.into_iter().take(7).collect();
        for head in heads {
            guest.bench.queues[queue].offer(head);
        }
        guest.bench.run();
    }
}
