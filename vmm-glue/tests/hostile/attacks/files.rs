//! Attacks with FUSE requests.

use super::{Attack, FS, fuse, fuse_init};
use crate::fuse::{self as op, HOSTILE_NAMES, ROOT, longs, words};
use crate::guest::{Device, Guest, Queue, register};

/// Length of the buffer for an answer.
const ANSWER: u32 = 8192;
/// Node ids: the root, ids that a guest can look up and forget, and ids that the VMM never returns.
const NODES: [u64; 6] = [0, ROOT, 2, 3, 999, u64::MAX];

pub fn attacks() -> Vec<Attack> {
    vec![
        Attack::on(FS, "FUSE requests with hostile names", |guest, device| {
            let mut requests = vec![init(), lookup("file")];
            for name in HOSTILE_NAMES.iter().map(|name| name.as_bytes()).chain(LONG_NAMES) {
                requests.extend(named(name));
            }
            send(guest, device, &requests);
        }),
        Attack::on(FS, "FUSE requests before INIT", |guest, device| {
            let mut requests = Vec::new();
            for opcode in 0..=60 {
                requests.extend([0, 8, 128].map(|len| (fuse(opcode, ROOT, &vec![0; len]), ANSWER)));
            }
            send(guest, device, &requests);
        }),
        Attack::on(FS, "FUSE requests of every opcode for stale nodes", |guest, device| {
            let mut requests = vec![init(), lookup("file"), (fuse(op::FORGET, 2, &longs([1])), 0)];
            for opcode in (0..=60).chain([4096, 0x8000_0000, u32::MAX]) {
                for node in NODES {
                    requests.extend([0, 16, 200].map(|len| (fuse(opcode, node, &vec![0xff; len]), ANSWER)));
                }
            }
            send(guest, device, &requests);
        }),
        Attack::on(FS, "FORGET requests that underflow, and huge BATCH_FORGET requests", |guest, device| {
            let mut requests = vec![init(), lookup("file")];
            for node in NODES {
                for count in [0, 1, u64::MAX, u64::MAX / 2, u64::MAX] {
                    requests.push((fuse(op::FORGET, node, &longs([count])), 0));
                    requests
                        .push((fuse(op::BATCH_FORGET, 0, &[&words([1, 0])[..], &longs([node, count])].concat()), 0));
                }
            }
            for count in [0, 2, 5000, u32::MAX] {
                requests.push((fuse(op::BATCH_FORGET, 0, &words([count, 0])), 0));
                requests.push((fuse(op::BATCH_FORGET, 0, &[&words([count, 0])[..], &vec![2; 80_000]].concat()), 0));
            }
            requests.extend([lookup("file"), (fuse(op::GETATTR, ROOT, &longs([0, 0])), ANSWER)]);
            let mut queues = guest.start(device);
            guest.serve(device, &mut queues[1], &requests);
            guest.serve(device, &mut queues[0], &requests);
        }),
        Attack::on(FS, "FUSE requests with huge counts and offsets", |guest, device| {
            let open = |opcode, node| (fuse(opcode, node, &words([libc::O_RDWR.cast_unsigned(), 0])), ANSWER);
            let mut requests = vec![init(), lookup("file"), open(op::OPEN, 2), open(op::OPENDIR, ROOT)];
            for handle in [0, 1, 2, u64::MAX] {
                for size in [0, 1 << 20, u32::MAX] {
                    for offset in [0, 1 << 62, u64::MAX] {
                        let read = [&longs([handle, offset])[..], &words([size, 0, 0, 0, 0, 0])].concat();
                        for opcode in [op::READ, op::READDIR, op::READDIRPLUS, op::WRITE] {
                            let node = if opcode == op::READ || opcode == op::WRITE { 2 } else { ROOT };
                            requests.push((fuse(opcode, node, &read), ANSWER));
                        }
                        requests.push((fuse(op::FALLOCATE, 2, &longs([handle, offset, offset, 0])), ANSWER));
                        requests.push((fuse(op::LSEEK, 2, &longs([handle, offset, 4])), ANSWER));
                        let copy = longs([handle, offset, 2, handle, offset, u64::MAX, 0]);
                        requests.push((fuse(op::COPY_FILE_RANGE, 2, &copy), ANSWER));
                    }
                    requests.push((fuse(op::LISTXATTR, 2, &words([size, 0])), ANSWER));
                    requests.push((fuse(op::GETXATTR, 2, &[&words([size, 0])[..], b"user.a\0"].concat()), ANSWER));
                    requests.push((fuse(op::SETXATTR, 2, &[&words([size, 0])[..], b"user.a\0x"].concat()), ANSWER));
                }
            }
            send(guest, device, &requests);
        }),
        Attack::on(FS, "lies about the length of FUSE requests", |guest, device| {
            let mut requests = vec![init()];
            for length in [0u32, 1, 39, 40, 41, 0x7fff_ffff, u32::MAX] {
                for opcode in [op::LOOKUP, op::FORGET, op::BATCH_FORGET, op::WRITE, op::INIT, op::INTERRUPT] {
                    let mut request = fuse(opcode, ROOT, b"file\0");
                    request[..4].copy_from_slice(&length.to_le_bytes());
                    requests.extend([0, 1, 15, 16, 17, ANSWER].map(|answer| (request.clone(), answer)));
                }
            }
            // These requests are shorter than a header.
            requests.extend([1, 4, 39].map(|len| (vec![40; len], ANSWER)));
            send(guest, device, &requests);
        }),
        Attack::on(FS, "INIT and DESTROY in any order, with any version", |guest, device| {
            let mut requests = Vec::new();
            for (major, minor) in [(0, 0), (6, 0), (7, 0), (7, 26), (7, 99), (8, 0), (u32::MAX, u32::MAX)] {
                let mut body = words([major, minor, u32::MAX, u32::MAX, u32::MAX]);
                body.resize(64, 0xff);
                requests.push((fuse(op::INIT, 0, &body), ANSWER));
                requests.extend([lookup("file"), (fuse(op::DESTROY, 0, &[]), 0), lookup("file"), init()]);
            }
            send(guest, device, &requests);
        }),
        Attack::on(FS, "25600 open files that are never closed", |guest, device| {
            let mut queues = guest.start(device);
            guest.serve(device, &mut queues[1], &[init(), lookup("file")]);
            let open = (fuse(op::OPEN, 2, &words([0, 0])), 16);
            let queue = full(guest, device, &queues, &open);
            guest.serve_again(device, &queue, 50);
        }),
        Attack::on(FS, "FUSE headers that change while the VMM reads them", |guest, device| {
            let mut queues = guest.start(device);
            guest.serve(device, &mut queues[1], &[init(), lookup("file")]);
            let request = guest.buffer(&fuse(op::LOOKUP, ROOT, b"file\0"));
            let queue = full(guest, device, &queues, &(fuse(op::LOOKUP, ROOT, b"file\0"), 128));
            let notify = device.register(register::QUEUE_NOTIFY);
            // All heads refer to one request.
            guest.store(crate::assembler::Size::Quad, queue.desc, request);
            guest.repeat(100, |code| {
                code.add16(queue.avail + 2, queue.size / 2);
                code.store32(notify, queue.index.into());
                for opcode in [op::FORGET, op::READ, op::BATCH_FORGET, op::LOOKUP, op::MKDIR, op::INIT] {
                    for (length, name) in [(45, 0x002f_2e2e), (u32::MAX, 0x656c_6966), (0, 0x2f2f_2f2f)] {
                        code.store32(request, length);
                        code.store32(request + 4, opcode);
                        code.store32(request + 40, name);
                    }
                }
                code.wait_equal16(queue.avail + 2, queue.used + 2);
            });
        }),
    ]
}

/// Names that are too long or not UTF-8, or that contain a NUL or control characters.
const LONG_NAMES: [&[u8]; 5] = [&[b'a'; 256], &[b'/'; 5000], b"\xff\xfe", b"a\0/b", b"\x01\n\x7f"];

fn init() -> (Vec<u8>, u32) {
    (fuse_init(), 64 + 16)
}

fn lookup(name: &str) -> (Vec<u8>, u32) {
    (fuse(op::LOOKUP, ROOT, format!("{name}\0").as_bytes()), ANSWER)
}

/// Returns requests with this name, for the operations that take a name. One LOOKUP has no NUL after the name.
fn named(name: &[u8]) -> Vec<(Vec<u8>, u32)> {
    let file = 0o100_644;
    let ended = [name, b"\0"].concat();
    let two = |first: &[u8], second: &[u8]| [first, b"\0", second, b"\0"].concat();
    let with = |fields: &[u8], names: &[u8]| [fields, names].concat();
    let mut requests = vec![
        (op::LOOKUP, ended.clone()),
        (op::LOOKUP, name.to_vec()),
        (op::MKNOD, with(&words([file, 0, 0, 0]), &ended)),
        (op::MKNOD, with(&words([libc::S_IFBLK | 0o666, 0x801, 0, 0]), &ended)),
        (op::MKDIR, with(&words([0o755, 0]), &ended)),
        (op::UNLINK, ended.clone()),
        (op::RMDIR, ended.clone()),
        (op::SYMLINK, two(name, b"target")),
        (op::LINK, with(&longs([2]), &ended)),
        (op::CREATE, with(&words([libc::O_RDWR.cast_unsigned(), file, 0, 0]), &ended)),
    ];
    for (old, new) in [(name, &b"x"[..]), (b"file", name), (name, name)] {
        requests.push((op::RENAME, with(&longs([ROOT]), &two(old, new))));
        requests.push((op::RENAME2, with(&[longs([ROOT]), words([2, 0])].concat(), &two(old, new))));
    }
    requests.into_iter().map(|(opcode, body)| (fuse(opcode, ROOT, &body), ANSWER)).collect()
}

fn send(guest: &mut Guest, device: &Device, requests: &[(Vec<u8>, u32)]) {
    let mut queues = guest.start(device);
    guest.serve(device, &mut queues[1], requests);
}

/// Activates the device with a new request queue whose heads all refer to one request. Returns this queue.
fn full(guest: &mut Guest, device: &Device, queues: &[Queue], (request, answer): &(Vec<u8>, u32)) -> Queue {
    let mut queue = guest.queue(1, device.queues[1]);
    guest.request(&mut queue, 0, request, *answer);
    (1..queue.size).for_each(|_| guest.offer(&mut queue, 0));
    let first = guest.queue(0, queues[0].size);
    guest.activate(device, &[first, queue]);
    queue
}
