//! Tests that policies allow or refuse requests as specified.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::MAX_JSON;

const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn policy(value: &Value) -> Policy {
    Policy::from_json(value.to_string().as_bytes()).unwrap()
}

/// Returns a [`Policies`] whose field `node` has the rules in `value`. The pod's policy allows everything.
fn node(value: &Value) -> Policies {
    Policies { node: policy(value), pod: Policy::default() }
}

fn container() -> Container<'static> {
    Container { id: "c1", ..Container::default() }
}

/// Returns the refusal of a container, or an empty text if the container is allowed.
fn created(rules: &Value, container: &Container<'_>) -> String {
    node(rules).check_container(container).err().map(|refusal| refusal.to_string()).unwrap_or_default()
}

fn arguments(list: &[&str]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

fn executed(rules: &Value, list: &[&str], difference: Option<&'static str>) -> String {
    let list = arguments(list);
    let exec = Exec { container: "c1", arguments: &list, difference, ..Exec::default() };
    node(rules).check_exec(&exec).err().map(|refusal| refusal.to_string()).unwrap_or_default()
}

#[test]
fn exec_is_refused_unless_the_command_is_listed() {
    let any = json!({});
    let none = json!({ "exec": [] });
    let some = json!({ "exec": [["ls", "-l"], ["date"]] });
    assert_eq!(executed(&any, &["sh"], Some("other user")), "");
    let refusal = "exec of [\"sh\"] in container c1 is refused by the rule \"exec\" of the node's policy: ";
    assert_eq!(executed(&none, &["sh"], None), format!("{refusal}no exec is allowed"));
    assert_eq!(executed(&some, &["sh"], None), format!("{refusal}the command is not listed"));
    assert_eq!(executed(&some, &["ls", "-l"], None), "");
    assert_eq!(executed(&some, &["date"], None), "");
    for other in [&["ls"][..], &["ls", "-l", "x"], &["ls -l"], &["date", ""], &[]] {
        assert!(executed(&some, other, None).ends_with("the command is not listed"), "{other:?}");
    }
    assert!(executed(&some, &["date"], Some("another user")).ends_with("policy: another user"));
}

#[test]
#[cfg_attr(miri, ignore = "random policies take minutes, and the code has no unsafe blocks")]
fn refusal_is_short_and_escaped() {
    let long = "ä\n".repeat(2000);
    for list in [vec!["sh", "-c", &long, &long], vec!["x"; 5000], vec!["\x1b"; 5000]] {
        let refusal = executed(&json!({ "exec": [] }), &list, None);
        assert!(refusal.len() < 400 && !refusal.contains(['\n', '\x1b']) && refusal.contains("…]"), "{refusal}");
    }
    // A text of at most 200 bytes can have more than 200 bytes after it is escaped.
    for id in ["\x1b".repeat(200), "\x1b".repeat(500), "c".repeat(500)] {
        let refusal = created(&json!({ "attach": false }), &Container { id: &id, input: Some("stdin"), ..container() });
        assert!(!refusal.contains('\x1b') && refusal.len() < 400 && refusal.contains("…\""), "{refusal}");
    }
}

#[test]
fn containers_with_input_are_refused_if_the_rule_attach_is_false() {
    let rules = json!({ "attach": false });
    assert_eq!(created(&rules, &container()), "");
    assert_eq!(
        created(&rules, &Container { input: Some("a terminal"), ..container() }),
        "container c1 with a terminal is refused by the rule \"attach\" of the node's policy: a client could attach to \
         the input"
    );
    assert_eq!(created(&json!({}), &Container { input: Some("stdin"), ..container() }), "");
}

#[test]
fn privileged_containers_are_refused_if_the_rule_is_false() {
    let privileged = Container { privilege: Some("the container has access to all devices"), ..container() };
    assert_eq!(created(&json!({ "privileged": true }), &privileged), "");
    assert_eq!(created(&json!({ "privileged": false }), &container()), "");
    assert_eq!(
        created(&json!({ "privileged": false }), &privileged),
        "container c1 is refused by the rule \"privileged\" of the node's policy: the container has access to all \
         devices"
    );
}

#[test]
fn images_are_allowed_by_digest_only() {
    let rules = json!({ "images": [DIGEST] });
    let with = |rules: &Value, image| created(rules, &Container { image, ..container() });
    let reference = format!("example.com/app@{DIGEST}");
    assert_eq!(with(&rules, Some(&reference)), "");
    assert_eq!(with(&rules, Some(DIGEST)), "");
    assert_eq!(
        with(&rules, Some("example.com/app:1")),
        "image \"example.com/app:1\" of container c1 is refused by the rule \"images\" of the node's policy: the \
         image must be named by its digest"
    );
    let other = reference.replace("0123", "4567");
    assert!(with(&rules, Some(&other)).ends_with("the digest is not listed"));
    assert!(
        with(&rules, None).starts_with("container c1 without an image reference is refused by the rule \"images\"")
    );
    assert!(with(&json!({ "images": [] }), Some(&reference)).ends_with("the digest is not listed"));
    assert_eq!(with(&json!({}), None), "");
}

#[test]
fn capabilities_are_limited_for_containers_and_execs() {
    let rules = json!({ "capabilities": ["CHOWN", "CAP_KILL"] });
    let with = |names: &[&str]| created(&rules, &Container { capabilities: arguments(names), ..container() });
    assert_eq!(with(&[]), "");
    assert_eq!(with(&["CAP_KILL", "CAP_CHOWN"]), "");
    assert_eq!(
        with(&["CAP_KILL", "CAP_SYS_ADMIN"]),
        "CAP_SYS_ADMIN for container c1 is refused by the rule \"capabilities\" of the node's policy: the capability \
         is not listed"
    );
    let list = arguments(&["id"]);
    let mut exec = Exec { container: "c1", arguments: &list, capabilities: arguments(&["CAP_KILL"]), difference: None };
    node(&rules).check_exec(&exec).unwrap();
    exec.capabilities.push("CAP_BPF".into());
    let refusal = node(&rules).check_exec(&exec).unwrap_err().to_string();
    assert!(refusal.starts_with("CAP_BPF for exec of [\"id\"] in container c1 is refused by the rule"), "{refusal}");
}

#[test]
fn mounts_are_limited_to_listed_and_standard_paths() {
    let with = |rules: &Value, path: &str| {
        created(rules, &Container { mounts: vec![Path::new("/etc/hosts"), Path::new(path)], ..container() })
    };
    let rules = json!({ "mounts": ["/data"] });
    for allowed in ["/data", "/data/a", "/dev/shm", "/etc/resolv.conf", "/etc/hostname", "/dev/termination-log"] {
        assert_eq!(with(&rules, allowed), "");
    }
    for refused in ["/", "/etc", "/database", "/data/../etc", "/etc/hosts/x", "data", ""] {
        assert!(with(&rules, refused).contains("refused by the rule \"mounts\""), "{refused}");
    }
    assert_eq!(
        with(&json!({ "mounts": [] }), "/data"),
        "the volume at \"/data\" of container c1 is refused by the rule \"mounts\" of the node's policy: the path is \
         not listed"
    );
    assert_eq!(with(&json!({ "mounts": ["/"] }), "/data"), "");
}

#[test]
fn port_forwarding_is_refused_if_the_rule_is_false() {
    let refusal = node(&json!({ "port_forward": false })).check_port_forward("127.0.0.1:80").unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "port forwarding to 127.0.0.1:80 is refused by the rule \"port_forward\" of the node's policy: forwarding \
         is not allowed"
    );
    node(&json!({})).check_port_forward("127.0.0.1:80").unwrap();
}

#[test]
fn refusal_names_the_first_policy_that_refuses() {
    let rules = json!({ "port_forward": false });
    let policies = Policies { node: Policy::default(), pod: policy(&rules) };
    assert_eq!(policies.check_port_forward("[::1]:1").unwrap_err().origin, Origin::Pod);
    let both = Policies { node: policy(&rules), pod: policy(&rules) };
    assert_eq!(both.check_port_forward("[::1]:1").unwrap_err().origin, Origin::Node);
}

#[test]
fn policies_are_parsed_from_json() {
    assert_eq!(Policies::from_json(b"", b"").unwrap(), Policies::default());
    let rules = json!({ "exec": [] });
    let policies = Policies::from_json(b"", rules.to_string().as_bytes()).unwrap();
    assert_eq!(policies, Policies { node: Policy::default(), pod: policy(&rules) });
    assert!(Policies::from_json(b"{}", b"{").is_err() && Policies::from_json(b"no", b"").is_err());
}

const COMMANDS: [&[&str]; 3] = [&["ls"], &["ls", "-l"], &["cat", "/a"]];
const PATHS: [&str; 6] = ["/", "/a", "/a/b", "/ab", "/c", "/etc/hosts"];
const NAMES: [&str; 3] = ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_ADMIN"];
const IMAGES: [&str; 3] = ["app:1", DIGEST, "sha256:0000000000000000000000000000000000000000000000000000000000000000"];

/// Generates a value of a list rule: `"any"`, or a list of some of `entries`.
fn some_of(entries: Vec<Value>) -> impl Strategy<Value = Value> {
    let count = entries.len();
    prop_oneof![Just(json!("any")), prop::sample::subsequence(entries, 0..=count).prop_map(Value::from)]
}

fn any_policy() -> impl Strategy<Value = Policy> {
    let list = |entries: &[&str]| some_of(entries.iter().map(|entry| json!(entry)).collect());
    let commands = some_of(COMMANDS.iter().map(|command| json!(command)).collect());
    (commands, any::<[bool; 3]>(), list(&IMAGES[1..]), list(&NAMES), list(&PATHS)).prop_map(
        |(exec, [attach, port_forward, privileged], images, capabilities, mounts)| {
            policy(&json!({
                "exec": exec, "attach": attach, "port_forward": port_forward, "privileged": privileged,
                "images": images, "capabilities": capabilities, "mounts": mounts,
            }))
        },
    )
}

#[derive(Debug, Clone)]
enum Request {
    Container(Container<'static>),
    Exec(Vec<String>, Option<&'static str>, Vec<String>),
    PortForward,
}

fn any_request() -> impl Strategy<Value = Request> {
    let names = prop::sample::subsequence(NAMES.to_vec(), 0..=NAMES.len()).prop_map(|names| arguments(&names));
    let paths = prop::sample::subsequence(PATHS.to_vec(), 0..=PATHS.len());
    let image = prop::option::of(prop::sample::select(IMAGES.to_vec()));
    let text = || prop::option::of(Just("x"));
    let container =
        (image, text(), text(), names.clone(), paths).prop_map(|(image, input, privilege, capabilities, paths)| {
            let mounts = paths.into_iter().map(Path::new).collect();
            Request::Container(Container { id: "c", image, input, privilege, capabilities, mounts })
        });
    let exec = (prop::sample::select(COMMANDS.to_vec()), text(), names)
        .prop_map(|(command, difference, names)| Request::Exec(arguments(command), difference, names));
    prop_oneof![container, exec, Just(Request::PortForward)]
}

impl Request {
    fn is_allowed(&self, policies: &Policies) -> bool {
        match self {
            Self::Container(container) => policies.check_container(container).is_ok(),
            Self::Exec(arguments, difference, capabilities) => {
                let (difference, capabilities) = (*difference, capabilities.clone());
                policies.check_exec(&Exec { container: "c", arguments, difference, capabilities }).is_ok()
            }
            Self::PortForward => policies.check_port_forward("a").is_ok(),
        }
    }
}

proptest! {
    #[test]
    #[cfg_attr(miri, ignore = "random policies take minutes, and the code has no unsafe blocks")]
    fn request_is_allowed_if_and_only_if_both_policies_allow_it(
        node in any_policy(), pod in any_policy(), request in any_request()
    ) {
        let alone = |policy: &Policy| {
            request.is_allowed(&Policies { node: policy.clone(), pod: Policy::default() })
        };
        let both = request.is_allowed(&Policies { node: node.clone(), pod: pod.clone() });
        prop_assert_eq!(both, alone(&node) && alone(&pod));
        // The result is the same if the node's and the pod's policy are swapped.
        prop_assert_eq!(both, request.is_allowed(&Policies { node: pod, pod: node }));
    }

    #[test]
    #[cfg_attr(miri, ignore = "random policies take minutes, and the code has no unsafe blocks")]
    fn shorter_list_never_allows_more(policy in any_policy(), request in any_request()) {
        let mut tighter = policy.clone();
        fn shorten<T>(list: &mut AtMost<T>) {
            if let AtMost::List(entries) = list {
                entries.pop();
            } else {
                *list = AtMost::List(Vec::new());
            }
        }
        shorten(&mut tighter.exec);
        shorten(&mut tighter.images);
        shorten(&mut tighter.capabilities);
        shorten(&mut tighter.mounts);
        let alone = |policy| request.is_allowed(&Policies { node: policy, pod: Policy::default() });
        prop_assert!(alone(policy) || !alone(tighter));
    }

    #[test]
    #[cfg_attr(miri, ignore = "random policies take minutes, and the code has no unsafe blocks")]
    fn policy_is_unchanged_after_conversion_to_json_and_back(policy in any_policy()) {
        let text = policy.to_json();
        prop_assert!(text.len() < MAX_JSON);
        prop_assert_eq!(Policies::from_json(&text, b"").unwrap().node, policy);
    }

    #[test]
    #[cfg_attr(miri, ignore = "random policies take minutes, and the code has no unsafe blocks")]
    fn parsing_and_checking_arbitrary_text_never_panics(
        text in ".{0,60}", list in prop::collection::vec(".{0,300}", 0..4)
    ) {
        let _ = Policy::from_json(text.as_bytes());
        let refusal = node(&json!({ "exec": [] }))
            .check_exec(&Exec { container: &text, arguments: &list, ..Exec::default() })
            .unwrap_err();
        prop_assert!(!refusal.to_string().contains('\n'));
    }
}
