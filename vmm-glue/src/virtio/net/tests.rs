//! Tests of frames in the queues. A pair of datagram sockets replaces the tap, because datagram sockets also preserve
//! frame boundaries.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};

use proptest::prelude::*;

use super::*;
use crate::virtio::testing::Bench;

pub const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];

fn interface(without: u64) -> (UnixDatagram, Bench<Net>) {
    let (mut sockets, bench) = interfaces(1, without);
    (sockets.remove(0), bench)
}

/// Creates an interface with one queue pair and rate limits.
pub fn limited_interface(receive: RateLimit, transmit: RateLimit) -> (UnixDatagram, Bench<Net>) {
    let (tap, socket) = UnixDatagram::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    let backend = Backend { taps: vec![File::from(OwnedFd::from(tap))], vhost: None };
    let mut device = Net::new(backend, MAC, 1500).unwrap();
    device.limit_rates(receive, transmit).unwrap();
    let mut bench = Bench::new(device);
    bench.activate_with_socket(0);
    (socket, bench)
}

/// Creates an interface with `pairs` queue pairs, and one socket for each pair. The driver acknowledges all features
/// except `without`.
fn interfaces(pairs: usize, without: u64) -> (Vec<UnixDatagram>, Bench<Net>) {
    let mut sockets = Vec::new();
    let taps = (0..pairs).map(|_| {
        let (tap, socket) = UnixDatagram::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        sockets.push(socket);
        File::from(OwnedFd::from(tap))
    });
    let backend = Backend { taps: taps.collect(), vhost: None };
    let mut bench = Bench::new(Net::new(backend, MAC, 1500).unwrap());
    bench.activate_with_socket(without);
    (sockets, bench)
}

pub fn frame(source: [u8; 6], payload: usize) -> Vec<u8> {
    let mut bytes = vec![0; VNET_HEADER_LEN];
    bytes.extend([0xff; 6]);
    bytes.extend(source);
    bytes.extend((0..payload + 2).map(|at| at as u8));
    bytes
}

#[test]
fn transmit_drops_frames_with_spoofed_source_mac_or_invalid_length() {
    let (socket, mut bench) = interface(0);
    let valid = frame(MAC, 100);
    bench.queues[1].add(&[&valid[..5], &valid[5..20], &valid[20..]], &[]);
    bench.queues[1].add(&[&frame([2, 0, 0, 1, 2, 4], 100)], &[]);
    bench.queues[1].add(&[&valid[..VNET_HEADER_LEN + 13]], &[]);
    bench.queues[1].add(&[&valid, &vec![0; 70_000]], &[]);
    bench.queues[1].add(&[], &[100]);
    let other = frame(MAC, 0);
    bench.queues[1].add(&[&other], &[]);
    bench.run();
    let mut buffer = vec![0; 2000];
    assert_eq!(socket.recv(&mut buffer).unwrap(), valid.len());
    assert_eq!(buffer[..valid.len()], valid);
    assert_eq!(socket.recv(&mut buffer).unwrap(), other.len());
    assert!(socket.recv(&mut buffer).is_err());
    for _ in 0..6 {
        assert!(bench.queues[1].poll().is_some());
    }
}

#[test]
fn receive_spreads_frame_over_mergeable_buffers() {
    let (socket, mut bench) = interface(0);
    let (small, large) = (frame([9; 6], 50), frame([9; 6], 3000));
    socket.send(&small).unwrap();
    socket.send(&large).unwrap();
    bench.run();
    // No frame is lost while there are no buffers.
    for _ in 0..100 {
        bench.queues[0].add(&[], &[1000]);
    }
    bench.run();
    let (_, bytes) = bench.queues[0].poll().unwrap();
    assert_eq!((bytes[10], bytes[11]), (1, 0));
    assert_eq!(bytes[12..], small[12..]);
    let mut all = Vec::new();
    for length in [1000, 1000, 1000, large.len() - 3000] {
        let (_, bytes) = bench.queues[0].poll().unwrap();
        assert_eq!(bytes.len(), length);
        all.extend(bytes);
    }
    assert_eq!((all[10], all[11]), (4, 0));
    assert_eq!(all[12..], large[12..]);
    assert!(bench.queues[0].poll().is_none());
    // The remaining buffers are used for the next frames.
    for round in 0..200 {
        socket.send(&frame([9; 6], round)).unwrap();
        bench.run();
        assert_eq!(bench.queues[0].poll().unwrap().1.len(), VNET_HEADER_LEN + 14 + round);
        bench.queues[0].add(&[], &[1000]);
    }
}

#[test]
fn receive_uses_one_buffer_per_frame_without_mergeable_buffers() {
    let offloads = 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
    let (socket, mut bench) = interface(offloads);
    for _ in 0..3 {
        bench.queues[0].add(&[], &[12, 1518]);
        socket.send(&frame([9; 6], 1000)).unwrap();
    }
    bench.run();
    for _ in 0..3 {
        let (_, bytes) = bench.queues[0].poll().unwrap();
        assert_eq!((bytes.len(), bytes[10]), (VNET_HEADER_LEN + 1014, 1));
    }
}

#[test]
fn too_small_receive_buffers_are_returned() {
    let (socket, mut bench) = interface(0);
    bench.queues[0].add(&[], &[2000]);
    bench.queues[0].add(&[], &[11]);
    bench.queues[0].add(&[b"wrong way"], &[]);
    bench.queues[0].add(&[], &[2000]);
    socket.send(&frame([9; 6], 10)).unwrap();
    bench.run();
    let used: Vec<usize> = std::iter::from_fn(|| bench.queues[0].poll()).map(|(_, bytes)| bytes.len()).collect();
    assert_eq!(used, [0, 0, 0, VNET_HEADER_LEN + 24]);
}

#[test]
fn device_works_after_reset() {
    let (socket, mut bench) = interface(0);
    for _ in 0..5 {
        bench.lock().reset();
        bench.run();
        socket.send(&frame([9; 6], 10)).unwrap();
        bench.activate_with_socket(0);
        bench.queues[0].add(&[], &[2000]);
        bench.run();
        assert!(bench.queues[0].poll().is_some());
    }
    let mut config = [0; 16];
    bench.lock().read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 1, 2, 3, 1, 0, 0, 0, 0xdc, 5, 0, 0, 0, 0]);
}

#[test]
fn broken_ring_sets_needs_reset() {
    let (socket, mut bench) = interface(0);
    bench.queues[0].set_avail_index(9999);
    socket.send(&frame([9; 6], 10)).unwrap();
    bench.run();
    assert_eq!(bench.irq.needs_reset.load(Ordering::SeqCst), 1);
}

const PAIRS_SET: [u8; 2] = [4, 0];
const OK: &[u8] = &[0];
const ERR: &[u8] = &[1];

/// Sends a command on queue `control` and returns the response.
fn command(bench: &mut Bench<Net>, control: usize, parts: &[&[u8]]) -> Vec<u8> {
    bench.queues[control].add(parts, &[1]);
    bench.run();
    bench.queues[control].poll().unwrap().1
}

/// Sends a frame through each socket. For each socket, returns whether its frame has reached the guest.
fn delivered(sockets: &[UnixDatagram], bench: &mut Bench<Net>) -> Vec<bool> {
    for socket in sockets {
        socket.send(&frame([9; 6], 10)).unwrap();
    }
    bench.run();
    (0..sockets.len()).map(|pair| bench.queues[2 * pair].poll().is_some()).collect()
}

#[test]
fn driver_selects_number_of_active_pairs() {
    let (sockets, mut bench) = interfaces(2, 0);
    assert_eq!(bench.queues.len(), 5);
    let mut config = [0; 12];
    bench.lock().read_config(0, &mut config);
    assert_eq!(config[6..10], [1, 0, 2, 0]);
    for pair in 0..2 {
        for _ in 0..10 {
            bench.queues[2 * pair].add(&[], &[2000]);
        }
    }
    // Only the first pair is active at first.
    assert_eq!(delivered(&sockets, &mut bench), [true, false]);
    let pairs = |count: u16| [&PAIRS_SET[..], &count.to_le_bytes()].concat();
    assert_eq!(command(&mut bench, 4, &[&pairs(2)]), OK);
    assert!(bench.queues[2].poll().is_some(), "the frame that was sent before the pair became active is lost");
    assert_eq!(delivered(&sockets, &mut bench), [true, true]);
    // Each transmit queue has its own socket.
    let valid = frame(MAC, 20);
    bench.queues[3].add(&[&valid], &[]);
    bench.queues[3].add(&[&frame([1; 6], 20)], &[]);
    bench.run();
    assert!(sockets[0].recv(&mut [0; 2000]).is_err());
    assert_eq!(sockets[1].recv(&mut [0; 2000]).unwrap(), valid.len());
    assert!(sockets[1].recv(&mut [0; 2000]).is_err());
    // Invalid numbers of pairs and other commands do not change the number of active pairs.
    for invalid in [0, 3, 0x8000, 0xffff] {
        assert_eq!(command(&mut bench, 4, &[&pairs(invalid)]), ERR, "the device must reject {invalid} pairs");
    }
    for invalid in [&[4, 0, 1][..], &[4, 0, 1, 0, 0], &[4, 1, 1, 0], &[0, 0, 1, 0], &[1], &[0; 5000]] {
        assert_eq!(command(&mut bench, 4, &[invalid]), ERR, "the device must reject command {invalid:?}");
    }
    assert_eq!(delivered(&sockets, &mut bench), [true, true]);
    // A command may consist of several buffers.
    assert_eq!(command(&mut bench, 4, &[&[4], &[0, 1], &[0]]), OK);
    assert_eq!(delivered(&sockets, &mut bench), [true, false]);
    // A command without space for a response is returned, but not executed.
    bench.queues[4].add(&[&pairs(2)], &[]);
    bench.run();
    assert_eq!(bench.queues[4].poll().unwrap().1.len(), 0);
    assert_eq!(delivered(&sockets, &mut bench), [true, false]);
    assert!(bench.irq.queues[4].load(Ordering::SeqCst) > 0);
    // After a reset, only the first pair is active again.
    assert_eq!(command(&mut bench, 4, &[&pairs(2)]), OK);
    bench.lock().reset();
    bench.run();
    bench.activate_with_socket(0);
    for pair in 0..2 {
        bench.queues[2 * pair].add(&[], &[2000]);
    }
    assert_eq!(delivered(&sockets, &mut bench), [true, false]);
}

#[test]
fn driver_may_use_one_pair_and_no_control_queue() {
    // Without VIRTIO_NET_F_MQ, the third queue is the control queue.
    let (sockets, mut bench) = interfaces(2, 1 << VIRTIO_NET_F_MQ);
    bench.queues[0].add(&[], &[2000]);
    sockets[0].send(&frame([9; 6], 10)).unwrap();
    bench.run();
    assert!(bench.queues[0].poll().is_some());
    assert_eq!(command(&mut bench, 2, &[&[4, 0, 1, 0]]), OK);
    assert_eq!(command(&mut bench, 2, &[&[4, 0, 2, 0]]), ERR);
    let (sockets, mut bench) = interfaces(2, 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ);
    bench.queues[0].add(&[], &[2000]);
    bench.queues[2].add(&[&[4, 0, 1, 0]], &[1]);
    sockets[0].send(&frame([9; 6], 10)).unwrap();
    bench.run();
    assert!(bench.queues[0].poll().is_some());
    assert!(bench.queues[2].poll().is_none(), "the control queue is served without VIRTIO_NET_F_CTRL_VQ");
}

#[test]
fn interface_with_one_pair_does_not_offer_multiqueue() {
    let (_, bench) = interfaces(1, 0);
    assert_eq!(bench.queues.len(), 2);
    assert_eq!(bench.lock().features() & (1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ), 0);
    let none = || Backend { taps: Vec::new(), vhost: None };
    assert!(Net::new(none(), MAC, 1500).is_err());
    let file = || tempfile::tempfile().unwrap();
    assert!(Net::new(Backend { taps: (0..9).map(|_| file()).collect(), vhost: None }, MAC, 1500).is_err());
}

/// Creates an interface that may request vhost-net, with its socket and the receiver of the requests.
fn interface_with_vhost() -> (UnixDatagram, Bench<Net>, Receiver<()>) {
    let (tap, socket) = UnixDatagram::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    let (request, requests) = channel();
    let vhost: RequestVhost = Box::new(move || request.send(()).unwrap());
    let backend = Backend { taps: vec![File::from(OwnedFd::from(tap))], vhost: Some(vhost) };
    (socket, Bench::new(Net::new(backend, MAC, 1500).unwrap()), requests)
}

/// Moves so many frames in both directions that the load is high, and checks that the device loop moves them.
fn exchange_many_frames(socket: &UnixDatagram, bench: &mut Bench<Net>) {
    for round in 0..500 {
        bench.queues[0].add(&[], &[2000]);
        bench.queues[1].add(&[&frame(MAC, round)], &[]);
        socket.send(&frame([9; 6], round)).unwrap();
        bench.run();
        assert!(bench.queues[0].poll().is_some() && bench.queues[1].poll().is_some(), "the device lost frame {round}");
        assert_eq!(socket.recv(&mut [0; 2000]).unwrap(), VNET_HEADER_LEN + 14 + round);
    }
}

#[test]
fn interface_requests_vhost_once_and_continues_without_answer() {
    let (socket, mut bench, requests) = interface_with_vhost();
    assert!(!bench.lock().waits_for_vhost(MAC));
    for _ in 0..2 {
        bench.activate_with_socket(0);
        exchange_many_frames(&socket, &mut bench);
        bench.lock().reset();
        bench.run();
    }
    assert_eq!(requests.try_iter().count(), 1);
    assert!(bench.lock().waits_for_vhost(MAC) && !bench.lock().waits_for_vhost([9; 6]));
}

#[test]
fn device_loop_continues_if_vhost_fails() {
    let (socket, mut bench, requests) = interface_with_vhost();
    // vhost-net fails to start, because these files are not `/dev/vhost-net`.
    let files = |count| (0..count).map(|_| File::open("/dev/null").unwrap()).collect::<Vec<_>>();
    assert!(matches!(bench.lock().offer_vhost(files(1)), Err(OfferError::NotRequested)));
    for round in 0..2 {
        bench.activate_with_socket(0);
        exchange_many_frames(&socket, &mut bench);
        if round == 0 {
            assert!(matches!(bench.lock().offer_vhost(files(2)), Err(OfferError::Count { files: 2, pairs: 1 })));
            bench.lock().offer_vhost(files(1)).unwrap();
            exchange_many_frames(&socket, &mut bench);
        }
        bench.lock().reset();
        bench.run();
    }
    assert!(matches!(bench.lock().offer_vhost(files(1)), Err(OfferError::NotRequested)));
    assert_eq!(bench.irq.shared_irqs.load(Ordering::SeqCst), 1, "the device must start vhost-net only once");
    assert_eq!(requests.try_iter().count(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn hostile_chains_do_not_bypass_mac_anti_spoofing(
        frames in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..200), any::<bool>()), 1..20),
        buffers in proptest::collection::vec(0usize..3000, 1..30),
    ) {
        let (socket, mut bench) = interface(0);
        for &length in &buffers {
            bench.queues[0].add(&[], &[length]);
        }
        for (bytes, is_own) in &frames {
            let start = frame(if *is_own { MAC } else { [1; 6] }, 0);
            bench.queues[1].add(&[&start, bytes], &[]);
            let _ = socket.send(bytes);
        }
        bench.run();
        let mut sent = 0;
        while socket.recv(&mut [0; 2000]).is_ok() {
            sent += 1;
        }
        prop_assert_eq!(sent, frames.iter().filter(|(_, is_own)| *is_own).count());
    }

    #[test]
    fn hostile_commands_set_only_valid_numbers_of_pairs(
        commands in proptest::collection::vec((proptest::collection::vec(0u8..6, 1..7), 0usize..3), 1..30),
    ) {
        let (sockets, mut bench) = interfaces(2, 0);
        let mut pairs = 1;
        for (bytes, response_len) in &commands {
            let writable: &[usize] = if *response_len > 0 { &[*response_len] } else { &[] };
            bench.queues[4].add(&[bytes], writable);
            bench.run();
            let (_, answer) = bench.queues[4].poll().unwrap();
            let valid = *response_len > 0 && matches!(bytes[..], [4, 0, 1..=2, 0]);
            if valid {
                pairs = usize::from(bytes[2]);
            }
            prop_assert_eq!(answer, if *response_len > 0 { vec![u8::from(!valid)] } else { Vec::new() });
        }
        for pair in 0..2 {
            bench.queues[2 * pair].add(&[], &[2000]);
        }
        prop_assert_eq!(delivered(&sockets, &mut bench), [true, pairs == 2]);
    }
}
