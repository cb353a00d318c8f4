//! Compares the protocol between shim and agent with its previous version (`protos/previous/agent.proto`). A shim and
//! an agent of different versions must recognize the difference, and no field number may get another meaning.

use std::collections::HashMap;

use husk_proto::{AGENT_PROTOCOL, agent};
use protobuf::Message;
use protobuf::reflect::{FieldDescriptor, FileDescriptor, MessageDescriptor};

#[allow(missing_docs, warnings, clippy::all, clippy::pedantic, clippy::restriction)]
mod previous {
    include!(concat!(env!("OUT_DIR"), "/previous/agent.rs"));
}

/// The version of `protos/previous/agent.proto`.
const PREVIOUS: u32 = 1;

#[test]
fn previous_version_is_the_one_before() {
    assert_eq!(AGENT_PROTOCOL, PREVIOUS + 1);
}

#[test]
fn setup_tells_the_version_to_both_versions() {
    let old = previous::SetupRequest { protocol_version: PREVIOUS, ..Default::default() };
    let read = agent::SetupRequest::parse_from_bytes(&old.write_to_bytes().unwrap()).unwrap();
    assert_eq!(read.protocol_version, PREVIOUS);
    let new = agent::SetupRequest { protocol_version: AGENT_PROTOCOL, ..Default::default() };
    let read = previous::SetupRequest::parse_from_bytes(&new.write_to_bytes().unwrap()).unwrap();
    assert_eq!(read.protocol_version, AGENT_PROTOCOL);
    let old = previous::SetupResponse { protocol_version: PREVIOUS, ..Default::default() };
    let read = agent::SetupResponse::parse_from_bytes(&old.write_to_bytes().unwrap()).unwrap();
    assert_eq!(read.protocol_version, PREVIOUS);
    let new = agent::SetupResponse { protocol_version: AGENT_PROTOCOL, ..Default::default() };
    let read = previous::SetupResponse::parse_from_bytes(&new.write_to_bytes().unwrap()).unwrap();
    assert_eq!(read.protocol_version, AGENT_PROTOCOL);
}

/// Returns the file's messages by their names.
fn messages(file: &FileDescriptor) -> HashMap<String, MessageDescriptor> {
    file.messages().map(|message| (message.name().to_owned(), message)).collect()
}

/// Returns the message's fields: the name and the type by the number.
fn fields(message: &MessageDescriptor) -> HashMap<i32, (String, String)> {
    let field = |field: FieldDescriptor| {
        let proto = field.proto();
        let kind = format!("{:?} {:?} {}", proto.label(), proto.type_(), proto.type_name());
        (field.number(), (field.name().to_owned(), kind))
    };
    message.fields().map(field).collect()
}

#[test]
fn field_numbers_keep_their_meaning() {
    let (old, new) = (messages(previous::file_descriptor()), messages(agent::file_descriptor()));
    for (name, old) in &old {
        let Some(new) = new.get(name) else { continue };
        let now = fields(new);
        for (number, meaning) in fields(old) {
            let kept = now.get(&number).is_none_or(|now| *now == meaning);
            assert!(kept, "field {number} of {name} was {meaning:?}, and is {:?} now", now.get(&number));
        }
    }
}
