//! Judges the events of one container: each event once, and in order.

/// What may have disturbed the events.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Disturbed {
    /// containerd was killed or restarted, so events can be missing.
    pub lossy: bool,
    /// The shim has died. containerd then publishes the exit and the delete itself, and cannot know what the shim has
    /// published already.
    pub repeated: bool,
    /// containerd did not answer for a while. Shims publish an event again if containerd has not confirmed it in time.
    pub unconfirmed: bool,
}

/// Checks the events of a container that has been removed. [`crate::events::Events`] describes the events' form.
///
/// # Errors
/// What is wrong with the events.
pub fn check(events: &[String], disturbed: Disturbed) -> Result<(), String> {
    let mut events = events.to_vec();
    if disturbed.unconfirmed {
        events.dedup();
    }
    let events = events.as_slice();
    let wrong = |what: &str| Err(format!("{what}: {events:?}"));
    let position = |name: &str| events.iter().position(|event| word(event, 0) == name);
    let count = |name: &str| events.iter().filter(|event| word(event, 0) == name).count();
    for (name, most) in [
        ("create", 1),
        ("start", 1),
        ("exit", if disturbed.repeated { 2 } else { 1 }),
        ("delete", if disturbed.repeated { 2 } else { 1 }),
    ] {
        if count(name) > most {
            return wrong(&format!("{} events `{name}`", count(name)));
        }
    }
    if events.iter().any(|event| event.starts_with("unknown")) {
        return wrong("an unknown event");
    }
    let order: Vec<usize> = ["create", "start", "exit", "delete"].into_iter().filter_map(position).collect();
    if !order.is_sorted() {
        return wrong("events out of order");
    }
    if let Some(delete) = position("delete") {
        let after = events[delete..].iter().any(|event| !matches!(word(event, 0), "delete" | "exit"));
        if after || (!disturbed.repeated && delete + 1 != events.len()) {
            return wrong("an event after the delete");
        }
    }
    if !disturbed.lossy {
        if !events.is_empty() && position("create") != Some(0) {
            return wrong("an event before the create");
        }
        if count("create") == 1 && count("delete") == 0 {
            return wrong("no delete");
        }
        if count("start") == 1 && count("exit") == 0 {
            return wrong("no exit");
        }
    }
    execs(events, disturbed)
}

/// Checks the events of the container's execs.
fn execs(events: &[String], disturbed: Disturbed) -> Result<(), String> {
    let mut ids: Vec<&str> =
        events.iter().filter(|event| event.starts_with("exec-")).map(|event| word(event, 1)).collect();
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        let of: Vec<&str> = events
            .iter()
            .filter(|event| event.starts_with("exec-") && word(event, 1) == id)
            .map(|event| word(event, 0))
            .collect();
        let whole = ["exec-added", "exec-started", "exec-exit"];
        let mut next = 0;
        for name in &of {
            match whole[next..].iter().position(|known| known == name) {
                Some(at) if at == 0 || disturbed.lossy => next += at + 1,
                _ => return Err(format!("the events of exec {id} are out of order: {events:?}")),
            }
        }
        // When a shim dies, containerd reports only the exit of the container.
        if !disturbed.lossy && !disturbed.repeated && of.len() == 2 {
            return Err(format!("exec {id} has started and not exited: {events:?}"));
        }
    }
    Ok(())
}

fn word(event: &str, number: usize) -> &str {
    event.split(' ').nth(number).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(events: &[&str], lossy: bool, repeated: bool) -> bool {
        let events: Vec<String> = events.iter().map(|&event| event.to_owned()).collect();
        check(&events, Disturbed { lossy, repeated, unconfirmed: false }).is_ok()
    }

    #[test]
    fn whole_lives_are_accepted() {
        assert!(judge(&[], false, false));
        assert!(judge(&["create", "exit 137", "delete 137"], false, false));
        assert!(judge(&["create", "delete 137"], false, false));
        let life = ["create", "start", "exec-added a", "exec-started a", "exec-added b", "exec-exit a 0", "exit 0"];
        assert!(judge(&[&life[..], &["delete 0"]].concat(), false, false));
        assert!(!judge(&life, false, false), "no delete");
        assert!(judge(&life, true, false));
    }

    #[test]
    fn repetitions_and_disorder_are_found() {
        for events in [
            &["create", "create", "delete 0"][..],
            &["create", "start", "exit 0", "exit 0", "delete 0"],
            &["create", "exit 0", "start", "delete 0"],
            &["create", "start", "delete 0"],
            &["start", "create", "exit 0", "delete 0"],
            &["create", "delete 0", "exec-added a"],
            &["create", "exec-exit a 0", "delete 0"],
            &["create", "exec-added a", "exec-started a", "delete 0"],
            &["unknown x"],
        ] {
            assert!(!judge(events, false, false), "{events:?}");
        }
        assert!(!judge(&["create", "start", "start", "exit 1", "delete 1"], true, true));
        assert!(!judge(&["exit 1", "start"], true, true));
    }

    #[test]
    fn exit_and_delete_can_be_repeated_after_the_death_of_the_shim() {
        let events = ["create", "start", "exit 137", "exit 137", "delete 137"];
        assert!(judge(&events, false, true));
        assert!(judge(&["create", "start", "exit 137", "delete 137", "exit 137", "delete 137"], false, true));
        assert!(!judge(&events, false, false));
    }

    #[test]
    fn events_that_containerd_has_not_confirmed_can_be_doubled() {
        let judge = |events: &[&str], unconfirmed: bool| {
            let events: Vec<String> = events.iter().map(|&event| event.to_owned()).collect();
            check(&events, Disturbed { unconfirmed, ..Disturbed::default() }).is_ok()
        };
        let events = ["create", "start", "exit 137", "delete 137", "delete 137"];
        assert!(judge(&events, true));
        assert!(!judge(&events, false));
        assert!(!judge(&["create", "start", "exit 137", "delete 137", "exit 137", "delete 137"], true));
        assert!(!judge(&["create", "start", "exit 137", "exit 0", "delete 137"], true));
    }
}
