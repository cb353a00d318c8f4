//! Encodes and decodes the D-Bus messages that the shim exchanges with systemd (D-Bus Specification 0.43, "Type System"
//! and "Message Protocol"). Supports only little-endian messages, because Husk supports only x86_64.

/// Maximum size of a received message, in bytes. The limit is large, because a signal may carry all properties of a
/// unit.
pub const MAX_MESSAGE: usize = 16 << 20;
/// Length of a header's fixed part, in bytes. The last value in the fixed part is the length of the header fields.
pub const FIXED_HEADER: usize = 16;
/// Alignment of a structure and of a message's body, in bytes.
const STRUCT: usize = 8;

/// The value of a property. Each variant represents one D-Bus type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// `b`
    Bool(bool),
    /// `t`
    U64(u64),
    /// `s`
    Text(String),
    /// `as`
    Texts(Vec<String>),
    /// `au`
    Numbers(Vec<u32>),
    /// `ay`
    Bytes(Vec<u8>),
}

/// A property and its value.
pub type Property = (&'static str, Value);

/// A method call.
#[derive(Debug)]
pub struct Call<'a> {
    /// Object path.
    pub path: &'a str,
    /// Interface.
    pub interface: &'a str,
    /// Method.
    pub member: &'a str,
    /// Bus name of the receiver. systemd ignores this name on a connection without a message bus.
    pub destination: &'a str,
    /// Signature of the arguments.
    pub signature: &'a str,
    /// The arguments.
    pub body: Body,
}

/// Encoder for the body of a message.
#[derive(Debug, Default)]
pub struct Body(Vec<u8>);

/// A received message.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// The reply to a method call.
    Return {
        /// Serial number of the call.
        to: u32,
        /// The encoded results.
        body: Vec<u8>,
    },
    /// The error reply to a method call.
    Error {
        /// Serial number of the call.
        to: u32,
        /// The error name.
        name: String,
        /// The error message.
        text: String,
    },
    /// A signal.
    Signal {
        /// The signal's name.
        member: String,
        /// The signal's encoded arguments.
        body: Vec<u8>,
    },
    /// Any other message, for example a method call. The shim ignores these messages.
    Other,
}

/// A message that violates the D-Bus protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed D-Bus message")]
pub struct Malformed;

impl Body {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    fn u32(&mut self, number: u32) {
        self.align(4);
        self.0.extend(number.to_le_bytes());
    }

    fn length(&mut self, length: usize) {
        // The conversion never fails, because the shim's messages have at most a few hundred bytes.
        self.u32(u32::try_from(length).unwrap_or(u32::MAX));
    }

    /// Encodes a value of type `b`.
    pub fn bool(mut self, value: bool) -> Self {
        self.u32(value.into());
        self
    }

    /// Encodes a value of type `s` or `o`.
    pub fn text(mut self, text: &str) -> Self {
        self.put_text(text);
        self
    }

    fn put_text(&mut self, text: &str) {
        self.length(text.len());
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    fn signature(&mut self, signature: &str) {
        // The conversion never fails, because the shim's signatures have only a few letters.
        self.0.push(u8::try_from(signature.len()).unwrap_or(u8::MAX));
        self.0.extend(signature.as_bytes());
        self.0.push(0);
    }

    fn variant(&mut self, value: &Value) {
        match value {
            Value::Bool(value) => {
                self.signature("b");
                self.u32((*value).into());
            }
            Value::U64(number) => {
                self.signature("t");
                self.align(8);
                self.0.extend(number.to_le_bytes());
            }
            Value::Text(text) => {
                self.signature("s");
                self.put_text(text);
            }
            Value::Texts(texts) => {
                self.signature("as");
                self.array(4, |body| texts.iter().for_each(|text| body.put_text(text)));
            }
            Value::Numbers(numbers) => {
                self.signature("au");
                self.array(4, |body| numbers.iter().for_each(|number| body.u32(*number)));
            }
            Value::Bytes(bytes) => {
                self.signature("ay");
                self.array(1, |body| body.0.extend(bytes));
            }
        }
    }

    /// Encodes an array. The encoded length excludes the padding before the first element.
    fn array(&mut self, alignment: usize, fill: impl FnOnce(&mut Self)) {
        self.u32(0);
        let length_at = self.0.len() - 4;
        self.align(alignment);
        let begin = self.0.len();
        fill(self);
        let length = u32::try_from(self.0.len() - begin).unwrap_or(u32::MAX);
        if let Some(slot) = self.0.get_mut(length_at..length_at + 4) {
            slot.copy_from_slice(&length.to_le_bytes());
        }
    }

    /// Encodes properties as a value of type `a(sv)`.
    pub fn properties(mut self, properties: &[Property]) -> Self {
        self.array(STRUCT, |body| {
            for (name, value) in properties {
                body.align(STRUCT);
                body.put_text(name);
                body.variant(value);
            }
        });
        self
    }

    /// Encodes an empty array of structures.
    pub fn empty_structures(mut self) -> Self {
        self.array(STRUCT, |_| ());
        self
    }
}

impl Call<'_> {
    /// Encodes the message. `serial` must not be 0.
    pub fn encode(&self, serial: u32) -> Vec<u8> {
        let mut out = Body(vec![b'l', METHOD_CALL, 0, 1]);
        out.length(self.body.0.len());
        out.u32(serial);
        out.array(STRUCT, |fields| {
            for (code, kind, text) in [
                (PATH, "o", self.path),
                (INTERFACE, "s", self.interface),
                (MEMBER, "s", self.member),
                (DESTINATION, "s", self.destination),
                (SIGNATURE, "g", self.signature),
            ] {
                fields.align(STRUCT);
                fields.0.push(code);
                fields.signature(kind);
                if kind == "g" { fields.signature(text) } else { fields.put_text(text) }
            }
        });
        out.align(STRUCT);
        out.0.extend(&self.body.0);
        out.0
    }
}

const METHOD_CALL: u8 = 1;
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SIGNATURE: u8 = 8;

/// Decodes values in sequence.
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Returns a reader at the start of `bytes`. `bytes` is a body or a whole message.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let end = self.at.checked_add(length).ok_or(Malformed)?;
        let bytes = self.bytes.get(self.at..end).ok_or(Malformed)?;
        self.at = end;
        Ok(bytes)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        self.take(1)?.first().copied().ok_or(Malformed)
    }

    /// Decodes a value of type `u`.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.align(4);
        Ok(u32::from_le_bytes(self.take(4)?.try_into().map_err(|_| Malformed)?))
    }

    /// Decodes a value of type `s` or `o`.
    pub fn text(&mut self) -> Result<&'a str, Malformed> {
        let length = usize::try_from(self.u32()?).map_err(|_| Malformed)?;
        self.terminated(length)
    }

    fn terminated(&mut self, length: usize) -> Result<&'a str, Malformed> {
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| Malformed)?;
        if self.u8()? == 0 { Ok(text) } else { Err(Malformed) }
    }

    fn signature(&mut self) -> Result<&'a str, Malformed> {
        let length = self.u8()?.into();
        self.terminated(length)
    }
}

/// Returns the number of bytes that follow a header's fixed part.
///
/// # Errors
/// [`Malformed`] if the header is invalid, or the number is larger than [`MAX_MESSAGE`].
pub fn remaining_length(fixed: &[u8; FIXED_HEADER]) -> Result<usize, Malformed> {
    if fixed.first() != Some(&b'l') || fixed.get(3) != Some(&1) {
        return Err(Malformed);
    }
    let (body, fields) = lengths(fixed)?;
    let rest = fields.next_multiple_of(STRUCT).checked_add(body).ok_or(Malformed)?;
    if rest <= MAX_MESSAGE { Ok(rest) } else { Err(Malformed) }
}

/// Returns the lengths of the body and of the header fields.
fn lengths(message: &[u8]) -> Result<(usize, usize), Malformed> {
    let mut reader = Reader { bytes: message, at: 4 };
    let body = reader.u32()?;
    let _serial = reader.u32()?;
    let fields = reader.u32()?;
    let fields = usize::try_from(fields).ok().filter(|length| *length <= MAX_MESSAGE).ok_or(Malformed)?;
    Ok((usize::try_from(body).map_err(|_| Malformed)?, fields))
}

/// Decodes a complete message.
pub fn decode(message: &[u8]) -> Result<Received, Malformed> {
    let (body_length, fields_length) = lengths(message)?;
    let end = FIXED_HEADER.checked_add(fields_length).ok_or(Malformed)?;
    let (mut member, mut error_name, mut to) = (None, None, None);
    // Alignment is relative to the beginning of the message. Therefore, `bytes` includes the fixed part.
    let mut reader = Reader { bytes: message.get(..end).ok_or(Malformed)?, at: FIXED_HEADER };
    while reader.at < end {
        reader.align(STRUCT);
        let code = reader.u8()?;
        match (code, reader.signature()?) {
            (MEMBER, "s") => member = Some(reader.text()?),
            (ERROR_NAME, "s") => error_name = Some(reader.text()?),
            (REPLY_SERIAL, "u") => to = Some(reader.u32()?),
            (_, "s" | "o") => drop(reader.text()?),
            (_, "u") => drop(reader.u32()?),
            (_, "g") => drop(reader.signature()?),
            _ => return Err(Malformed),
        }
    }
    let begin = end.next_multiple_of(STRUCT);
    let body = message.get(begin..).filter(|body| body.len() == body_length).ok_or(Malformed)?;
    Ok(match message.get(1) {
        Some(&METHOD_RETURN) => Received::Return { to: to.ok_or(Malformed)?, body: body.to_vec() },
        Some(&ERROR) => Received::Error {
            to: to.ok_or(Malformed)?,
            name: error_name.ok_or(Malformed)?.to_owned(),
            // By convention, if the first argument is a string, this string is the error message.
            text: Reader::new(body).text().unwrap_or_default().to_owned(),
        },
        Some(&SIGNAL) => Received::Signal { member: member.ok_or(Malformed)?.to_owned(), body: body.to_vec() },
        _ => Received::Other,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Encodes a message as systemd would send it.
    pub fn message(kind: u8, fields: &[(u8, &str, &str)], to: Option<u32>, body: Body) -> Vec<u8> {
        let mut out = Body(vec![b'l', kind, 0, 1]);
        out.length(body.0.len());
        out.u32(7);
        out.array(STRUCT, |list| {
            for (code, signature, text) in fields {
                list.align(STRUCT);
                list.0.push(*code);
                list.signature(signature);
                if *signature == "g" { list.signature(text) } else { list.put_text(text) }
            }
            if let Some(to) = to {
                list.align(STRUCT);
                list.0.push(REPLY_SERIAL);
                list.signature("u");
                list.u32(to);
            }
        });
        out.align(STRUCT);
        out.0.extend(body.0);
        out.0
    }

    pub fn returned(to: u32, job: &str) -> Vec<u8> {
        message(METHOD_RETURN, &[(SIGNATURE, "g", "o")], Some(to), Body::default().text(job))
    }

    pub fn failed(to: u32, name: &str, text: &str) -> Vec<u8> {
        let fields = [(ERROR_NAME, "s", name), (SIGNATURE, "g", "s")];
        message(ERROR, &fields, Some(to), Body::default().text(text))
    }

    pub fn removed(job: &str, unit: &str, result: &str) -> Vec<u8> {
        let fields = [(PATH, "o", "/x"), (MEMBER, "s", "JobRemoved"), (SIGNATURE, "g", "uoss")];
        message(SIGNAL, &fields, None, Body(vec![9, 0, 0, 0]).text(job).text(unit).text(result))
    }

    #[test]
    fn encode_matches_the_specification() {
        // `expected` was written by hand according to the specification. The message corresponds to the command `busctl
        // call … ResetFailedUnit s a.scope`.
        let call = Call {
            path: "/o",
            interface: "i.M",
            member: "ResetFailedUnit",
            destination: "d.s",
            signature: "s",
            body: Body::default().text("a.scope"),
        };
        let expected = b"l\x01\0\x01\x0c\0\0\0\x05\0\0\0\x5d\0\0\0\
            \x01\x01o\0\x02\0\0\0/o\0\0\0\0\0\0\
            \x02\x01s\0\x03\0\0\0i.M\0\0\0\0\0\
            \x03\x01s\0\x0f\0\0\0ResetFailedUnit\0\
            \x06\x01s\0\x03\0\0\0d.s\0\0\0\0\0\
            \x08\x01g\0\x01s\0";
        let encoded = call.encode(5);
        let (header, body) = encoded.split_at(encoded.len() - 12);
        let mut expected = expected.to_vec();
        let fields = u8::try_from(expected.len() - FIXED_HEADER).unwrap();
        expected[12] = fields;
        expected.resize(expected.len().next_multiple_of(8), 0);
        assert_eq!((header, body), (&*expected, &b"\x07\0\0\0a.scope\0"[..]));
    }

    #[test]
    fn properties_are_aligned() {
        let properties = [
            ("P", Value::Numbers(vec![1, 2])),
            ("D", Value::Bool(true)),
            ("M", Value::U64(3)),
            ("C", Value::Bytes(vec![6])),
            ("S", Value::Text("x".into())),
            ("T", Value::Texts(vec!["y".into(), "z".into()])),
        ];
        let Body(bytes) = Body::default().properties(&properties);
        let expected = b"\x8e\0\0\0\0\0\0\0\
            \x01\0\0\0P\0\x02au\0\0\0\x08\0\0\0\x01\0\0\0\x02\0\0\0\
            \x01\0\0\0D\0\x01b\0\0\0\0\x01\0\0\0\
            \x01\0\0\0M\0\x01t\0\0\0\0\0\0\0\0\
            \x03\0\0\0\0\0\0\0\
            \x01\0\0\0C\0\x02ay\0\0\0\x01\0\0\0\x06\0\0\0\0\0\0\0\
            \x01\0\0\0S\0\x01s\0\0\0\0\x01\0\0\0x\0\0\0\0\0\0\0\
            \x01\0\0\0T\0\x02as\0\0\0\x0e\0\0\0\x01\0\0\0y\0\0\0\x01\0\0\0z\0";
        assert_eq!(bytes, expected);
        assert_eq!(Body::default().empty_structures().0, [0; 8]);
    }

    #[test]
    fn decode_parses_replies_errors_and_signals() {
        let back = |message: Vec<u8>| {
            let fixed: [u8; FIXED_HEADER] = message[..FIXED_HEADER].try_into().unwrap();
            assert_eq!(remaining_length(&fixed).unwrap(), message.len() - FIXED_HEADER);
            decode(&message).unwrap()
        };
        assert!(matches!(back(returned(4, "/job/1")), Received::Return { to: 4, .. }));
        let error = Received::Error { to: 5, name: "a.b".into(), text: "why".into() };
        assert_eq!(back(failed(5, "a.b", "why")), error);
        let Received::Signal { member, body } = back(removed("/job/1", "x.scope", "done")) else { panic!("no signal") };
        let mut reader = Reader::new(&body);
        assert_eq!((member.as_str(), reader.u32()), ("JobRemoved", Ok(9)));
        assert_eq!([reader.text(), reader.text(), reader.text()], [Ok("/job/1"), Ok("x.scope"), Ok("done")]);
    }

    proptest::proptest! {
        #[test]
        fn decode_never_panics(bytes: Vec<u8>, cut in 0..80usize, change: (u8, u8)) {
            let _ = decode(&bytes);
            let mut message = removed("/job/1", "x.scope", "done");
            let at = usize::from(change.0) % message.len();
            message[at] = change.1;
            message.truncate(message.len() - cut.min(message.len()));
            let _ = decode(&message);
            if let Some(Ok(fixed)) = message.get(..FIXED_HEADER).map(<[u8; FIXED_HEADER]>::try_from) {
                let _ = remaining_length(&fixed);
            }
        }
    }
}
