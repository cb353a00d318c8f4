//! Tests of the connection state machine with a scripted guest.

mod hostile;
mod rate_limit;
mod streams;

use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};

use super::packet::{HEADER_LEN, Header, Op, TYPE_STREAM};
use super::window::{MAX_WINDOW, MIN_WINDOW};
use super::*;
use crate::virtio::testing::Bench;

const CID: u64 = 3;
const GUEST_BUFFER: u32 = 128 * 1024;

/// A guest that a test controls.
struct Guest {
    bench: Bench<Vsock>,
}

/// The ports of a connection: the port on the host, and the port in the guest.
#[derive(Clone, Copy)]
struct Side {
    host: u32,
    guest: u32,
}

impl Guest {
    fn new(without: u64) -> Self {
        let mut bench = Bench::new(Vsock::new(CID, RateLimit::default()).unwrap());
        bench.activate(without);
        let mut this = Self { bench };
        this.refill(64);
        this
    }

    fn refill(&mut self, count: usize) {
        for _ in 0..count {
            if self.bench.queues[0].free_descriptors() == 0 {
                break;
            }
            self.bench.queues[0].add(&[], &[4096]);
        }
        self.bench.run();
    }

    /// Starts to connect. The receiver gets the result, with the client's socket.
    fn connect(&mut self, port: u32) -> Receiver<std::io::Result<UnixStream>> {
        let (sender, receiver) = channel();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let reply = move |result: std::io::Result<()>| sender.send(result.map(|()| ours)).unwrap();
        self.bench.lock().connect(port, theirs.into(), Box::new(reply));
        self.bench.run();
        receiver
    }

    /// Returns the packets that the device has sent, and makes their receive buffers available again.
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
            buf_alloc: GUEST_BUFFER,
            fwd_cnt: 0,
        }
    }

    fn send(&mut self, side: Side, op: Op, flags: u32, fwd_cnt: u32, data: &[u8]) {
        let header = Header { flags, fwd_cnt, len: data.len() as u32, ..Self::header(side, op) };
        self.send_raw(&[&header.to_bytes(), data]);
    }

    fn open(&mut self, port: u32) -> (Side, UnixStream) {
        let reply = self.connect(port);
        let packets = self.packets();
        let (request, _) = packets[0];
        assert_eq!((packets.len(), request.op, request.dst_port), (1, Op::Request, port));
        assert_eq!((request.src_cid, request.dst_cid, request.buf_alloc), (2, CID, MIN_WINDOW));
        assert!(reply.try_recv().is_err(), "the client received a reply before the guest answered");
        let side = Side { host: request.src_port, guest: port };
        self.send(side, Op::Response, 0, 0, &[]);
        let stream = reply.try_recv().unwrap().unwrap();
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
