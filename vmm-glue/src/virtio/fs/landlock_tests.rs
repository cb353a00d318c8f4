//! Tests that the landlock rules of the jail do not change the answer to any request within the share.

use std::thread;

use super::names_tests::{CREATE_SUPP_GROUP, Request, requests};
use super::requests_tests::{with_handle, without_handle};
use super::test_guest::*;
use super::test_tree::Tree;
use crate::jail::restrict;

/// Returns the request with number `at`, with the node to which it goes, or `None` if there are fewer requests.
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

/// Sends each request to a guest with a new share. Returns the errno of each answer.
fn answers(confined: bool) -> Vec<(String, i32)> {
    let answer = |at| {
        let tree = Tree::new();
        let (share, belongings) = (tree.share(), belongings());
        // The rules hold for this thread and for the workers that it starts.
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
    assert!(free.iter().filter(|(_, error)| *error == 0).count() > 50, "{free:?}");
    assert_eq!(confined.join().unwrap(), free);
}
