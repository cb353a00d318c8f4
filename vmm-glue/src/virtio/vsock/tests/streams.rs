//! Tests with a well-behaved guest: connections, data with credit, and shutdown of single directions.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::Ordering;

use super::*;
use crate::virtio::vsock::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

#[test]
fn connect_reports_refusal_and_acceptance() {
    let mut guest = Guest::new(0);
    let reply = guest.connect(7);
    let (request, _) = guest.packets()[0];
    guest.send(Side { host: request.src_port, guest: 7 }, Op::Reset, 0, 0, &[]);
    assert_eq!(reply.try_recv().unwrap().unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(guest.connections(), 0);
    let (_side, _stream) = guest.open(8);
    assert_eq!(guest.connections(), 1);
}

#[test]
fn client_that_gives_up_before_the_guest_accepts_is_told_to_the_guest() {
    let mut guest = Guest::new(0);
    let (sender, receiver) = channel();
    let (ours, theirs) = UnixStream::pair().unwrap();
    guest.bench.lock().connect(7, theirs.into(), Box::new(move |result| sender.send(result).unwrap()));
    let (request, _) = guest.packets()[0];
    drop(ours);
    let side = Side { host: request.src_port, guest: 7 };
    guest.send(side, Op::Response, 0, 0, &[]);
    assert!(receiver.try_recv().unwrap().is_ok());
    let packets = guest.packets();
    assert_eq!((packets[0].0.op, packets[0].0.flags), (Op::Shutdown, SHUTDOWN_BOTH));
    guest.send(side, Op::Reset, 0, 0, &[]);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn refused_connection_closes_the_devices_socket() {
    let mut guest = Guest::new(0);
    let (sender, receiver) = channel();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.bench.lock().connect(7, theirs.into(), Box::new(move |result| sender.send(result).unwrap()));
    let (request, _) = guest.packets()[0];
    guest.send(Side { host: request.src_port, guest: 7 }, Op::Reset, 0, 0, &[]);
    assert!(receiver.try_recv().unwrap().is_err());
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
}

#[test]
fn connect_waits_for_the_driver_and_a_receive_buffer() {
    let mut bench = Bench::new(Vsock::new(CID, RateLimit::default()).unwrap());
    let (sender, receiver) = channel();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    bench.lock().connect(5, theirs.into(), Box::new(move |result| sender.send(result).unwrap()));
    bench.run();
    bench.activate(0);
    let mut guest = Guest { bench };
    assert!(guest.packets().is_empty());
    guest.refill(4);
    let (request, _) = guest.packets()[0];
    guest.send(Side { host: request.src_port, guest: 5 }, Op::Response, 0, 0, &[]);
    assert!(receiver.try_recv().unwrap().is_ok());
}

/// Transfers more data than any buffer can hold, in both directions at once. The reader on each side is sometimes slow.
fn transfer(without: u64) {
    let mut guest = Guest::new(without);
    let (side, mut stream) = guest.open(1024);
    let total = 3 * 1024 * 1024;
    let (down, up) = (pattern(total, 1), pattern(total, 2));
    let (mut written, mut received_down, mut taken) = (0, Vec::new(), 0_u32);
    let (mut sent, mut received_up, mut host_fwd, mut window) = (0_usize, Vec::new(), 0_u32, MIN_WINDOW);
    for turn in 0.. {
        assert!(
            turn < 100_000,
            "the transfer did not end: host wrote {} bytes, guest received {}, guest sent {}, host received {}",
            written,
            received_down.len(),
            sent,
            received_up.len()
        );
        if let Ok(count) = stream.write(&down[written..]) {
            written += count;
        }
        for (header, data) in guest.packets() {
            (host_fwd, window) = (header.fwd_cnt, header.buf_alloc);
            received_down.extend(data);
            if header.op == Op::CreditRequest {
                taken = received_down.len() as u32;
                guest.send(side, Op::CreditUpdate, 0, taken, &[]);
            }
        }
        assert!(
            received_down.len() as u32 - taken <= GUEST_BUFFER,
            "the device sent more data than the guest's credit"
        );
        if turn % 3 == 0 {
            taken = received_down.len() as u32;
        }
        let credit = window as usize - (sent as u32).wrapping_sub(host_fwd) as usize;
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
                received_up.extend_from_slice(&buffer[..count]);
            }
        }
        if received_down.len() == total && received_up.len() == total {
            break;
        }
    }
    assert!(received_down == down && received_up == up);
}

#[test]
fn data_arrives_in_both_directions() {
    transfer(0);
    transfer(1 << VIRTIO_RING_F_EVENT_IDX);
}

#[test]
fn data_is_sent_only_with_credit() {
    let mut guest = Guest::new(0);
    let (side, mut stream) = guest.open(1);
    let mut written = 0;
    while let Ok(count) = stream.write(&[1; 50_000]) {
        written += count;
        guest.bench.run();
    }
    let mut received = 0;
    loop {
        let packets = guest.packets();
        if packets.is_empty() {
            break;
        }
        received += packets.iter().map(|(_, data)| data.len()).sum::<usize>();
        let requests = packets.iter().filter(|(header, _)| header.op == Op::CreditRequest).count();
        assert!(requests <= 1, "the device must not send more than one CREDIT_REQUEST, but sent {requests}");
    }
    assert_eq!(received, GUEST_BUFFER as usize);
    guest.send(side, Op::CreditUpdate, 0, GUEST_BUFFER, &[]);
    let more: usize = guest.packets().iter().map(|(_, data)| data.len()).sum();
    assert!(more > 0 && written > GUEST_BUFFER as usize);
}

/// Sends `data` until the connection has no credit, although the client does not read: fills the socket, and then the
/// connection's buffer. Returns the number of bytes sent.
fn fill(guest: &mut Guest, side: Side, data: &[u8]) -> usize {
    let (mut sent, mut fwd, mut window) = (0, 0, MIN_WINDOW);
    loop {
        for (header, _) in guest.packets() {
            (fwd, window) = (header.fwd_cnt, header.buf_alloc);
        }
        let credit = (window - (sent as u32 - fwd)) as usize;
        if credit == 0 {
            return sent;
        }
        let count = credit.min(60_000);
        guest.send(side, Op::ReadWrite, 0, 0, &data[sent..sent + count]);
        sent += count;
    }
}

#[test]
fn stalled_connections_together_hold_a_bounded_amount_of_data() {
    let mut guest = Guest::new(0);
    let data = pattern(MAX_WINDOW as usize, 0);
    let mut stalled = Vec::new();
    let mut held = 0;
    for port in 0..200 {
        let (side, stream) = guest.open(port);
        held += fill(&mut guest, side, &data);
        stalled.push(stream);
    }
    // Each connection holds at most its window, and about a window in the socket.
    assert!(held < 8 << 20, "200 stalled connections hold {} KiB", held >> 10);
    let (side, mut stream) = guest.open(1000);
    guest.send(side, Op::ReadWrite, 0, 0, b"hello");
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 5);
}

#[test]
fn window_grows_while_the_client_reads() {
    let mut guest = Guest::new(0);
    let (side, mut stream) = guest.open(1);
    let (mut fwd, mut window, mut sent) = (0, MIN_WINDOW, 0);
    for _ in 0..200 {
        let count = (window - (sent - fwd)).min(60_000);
        guest.send(side, Op::ReadWrite, 0, 0, &vec![1; count as usize]);
        sent += count;
        while stream.read(&mut [0; 65536]).is_ok() {
            guest.bench.run();
        }
        for (header, _) in guest.packets() {
            (fwd, window) = (header.fwd_cnt, header.buf_alloc);
        }
    }
    assert_eq!(window, MAX_WINDOW);
}

#[test]
fn window_does_not_grow_by_data_that_is_dropped() {
    let mut guest = Guest::new(0);
    let (side, stream) = guest.open(1);
    drop(stream);
    let (mut fwd, mut window, mut sent) = (0, MIN_WINDOW, 0);
    for _ in 0..20 {
        let count = window - (sent - fwd);
        guest.send(side, Op::ReadWrite, 0, 0, &vec![1; count as usize]);
        sent += count;
        for (header, _) in guest.packets() {
            (fwd, window) = (header.fwd_cnt, header.buf_alloc);
        }
    }
    assert_eq!((window, fwd), (MIN_WINDOW, 20 * MIN_WINDOW));
}

#[test]
fn slow_reader_does_not_delay_other_connections() {
    let mut guest = Guest::new(0);
    let (slow, mut slow_stream) = guest.open(1);
    let (quick, mut quick_stream) = guest.open(2);
    let data = pattern(MAX_WINDOW as usize, 0);
    let sent = fill(&mut guest, slow, &data);
    guest.send(quick, Op::ReadWrite, 0, 0, b"hello");
    let mut buffer = [0; 16];
    assert_eq!(quick_stream.read(&mut buffer).unwrap(), 5);
    // The guest closes the connection. The client must still receive all data that the guest has sent, and then the end
    // of the stream.
    guest.send(slow, Op::Shutdown, SHUTDOWN_BOTH, 0, &[]);
    guest.send(slow, Op::Reset, 0, 0, &[]);
    let mut received = Vec::new();
    let mut part = vec![0; 30_000];
    loop {
        match slow_stream.read(&mut part) {
            Ok(0) => break,
            Ok(count) => received.extend_from_slice(&part[..count]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        guest.bench.run();
    }
    assert!(received == data[..sent]);
    assert_eq!(guest.connections(), 1);
}

#[test]
fn write_shutdown_by_the_client_reaches_the_guest() {
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
    // When the client closes its socket, the device also shuts down the receive direction.
    drop(stream);
    let packets = guest.packets();
    assert_eq!((packets[0].0.op, packets[0].0.flags), (Op::Shutdown, SHUTDOWN_BOTH));
    guest.send(side, Op::Reset, 0, 10, &[]);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn guest_shutdown_of_single_directions_reaches_host() {
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
fn guest_close_with_unread_data_ends_the_stream_without_error() {
    let mut guest = Guest::new(0);
    // The guest withdraws its credit. Therefore, the device does not read the client's data from the socket.
    let (side, mut stream) = guest.open(1);
    guest.send(Side { ..side }, Op::CreditUpdate, 0, 0u32.wrapping_sub(GUEST_BUFFER), &[]);
    stream.write_all(b"never read").unwrap();
    guest.bench.run();
    guest.send(side, Op::Shutdown, SHUTDOWN_BOTH, 0, &[]);
    guest.packets();
    assert_eq!(stream.read(&mut [0; 4]).unwrap(), 0);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn host_close_shuts_down_both_directions() {
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
fn packet_may_be_split_over_descriptors() {
    let mut guest = Guest::new(0);
    let (side, mut stream) = guest.open(1);
    let header = Header { len: 6, ..Guest::header(side, Op::ReadWrite) }.to_bytes();
    guest.send_raw(&[&header[..20], &header[20..], b"ab", b"cd", b"efgh"]);
    let mut buffer = [0; 16];
    assert_eq!(stream.read(&mut buffer).unwrap(), 6);
    assert_eq!(&buffer[..6], b"abcdef");
}

#[test]
fn closed_connections_are_removed_and_one_turn_causes_one_interrupt() {
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
