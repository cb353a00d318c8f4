//! Tests that the jail's landlock rules do not change the answers to requests for files in the share.

use std::thread;

use super::names_tests::{CREATE_SUPP_GROUP, Request, requests};
use super::requests_tests::{with_handle, without_handle};
use super::test_guest::*;
use super::test_tree::Tree;
use crate::jail::restrict;

/// Returns request number `at`, and the node to which the request goes. Returns `None` if no request has this number.
fn request(guest: &mut Guest, at: usize) -> Option<(u64, Request)> {
    let (directory, file) = (guest.lookup(ROOT, "dir"), guest.lookup(ROOT, "file"));
    let handle = guest.open(OPEN, file, libc::O_RDWR);
    let to = |node: u64| move |request| (node, request);
    let names = [&b"new\0"[..], b"file\0"].map(|name| requests(directory, file, name));
    names
        .into_iter()
        .flatten()
        .map(to(ROOT))
        .chain(without_handle().into_iter().map(to(file)))
        .chain(without_handle().into_iter().map(to(directory)))
        .chain(with_handle(handle, file).into_iter().map(to(file)))
        .nth(at)
}

/// Sends each request to a new device with a new share. Returns the label of each request and the errno of its answer.
fn answers(confined: bool) -> Vec<(String, i32)> {
    let answer = |at| {
        let tree = Tree::new();
        let (share, belongings) = (tree.share(), belongings());
        // The landlock rules apply to this thread and to the worker threads that this thread starts.
        let thread = thread::spawn(move || {
            if confined {
                restrict(Some(&share), false).unwrap();
            }
            let mut guest = Guest::with_belongings(&share, 1, belongings);
            guest.init_with(CREATE_SUPP_GROUP);
            let (node, (label, opcode, body)) = request(&mut guest, at)?;
            let error = guest.error(opcode, node, &body);
            Some((format!("{at}: {label}"), error))
        });
        thread.join().unwrap()
    };
    (0..).map_while(answer).collect()
}

#[test]
fn landlock_rules_do_not_change_answers_within_share() {
    let confined = thread::spawn(|| answers(true));
    let free = answers(false);
    let succeeded = free.iter().filter(|(_, error)| *error == 0).count();
    assert!(succeeded > 50, "more than 50 requests must succeed without landlock rules, but {succeeded} did: {free:?}");
    assert_eq!(confined.join().unwrap(), free);
}
