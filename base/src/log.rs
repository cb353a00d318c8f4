//! The `tracing` subscriber of Husk's processes: it formats each event's fields and passes the line to a sink.
//!
//! The sink decides which events are logged, how a field looks and where lines go. Spans are ignored, because no event
//! of Husk depends on the fields of a span.

use std::fmt::{self, Write as _};

use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, span};

/// Receives the events of a process as text.
pub trait Sink: Send + Sync + 'static {
    /// Whether an event is logged. `tracing` caches the answer for each call site. A sink that
    /// changes an answer must call `tracing::callsite::rebuild_interest_cache`.
    fn enabled(&self, metadata: &Metadata<'_>) -> bool;

    /// Writes an event. `fields` is the text that [`Sink::field`] has appended for all fields of the event, in the
    /// order of the fields.
    fn write(&self, metadata: &'static Metadata<'static>, message: &str, fields: &str);

    /// Appends one field to `fields`. The default is ` name=value`, with the value as `Debug` formats it.
    fn field(&self, fields: &mut String, name: &str, value: Value<'_>) {
        let _ = write!(fields, " {name}={value:?}");
    }
}

/// Value of a field. `Display` formats a string unchanged. `Debug` formats a string in quotes and with escapes.
pub enum Value<'a> {
    /// A string.
    Text(&'a str),
    /// Any other value, or a value that the log statement marks with `?` or `%`.
    Other(&'a dyn fmt::Debug),
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => formatter.write_str(text),
            Self::Other(value) => value.fmt(formatter),
        }
    }
}

impl fmt::Debug for Value<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => text.fmt(formatter),
            Self::Other(value) => value.fmt(formatter),
        }
    }
}

/// Makes `sink` the receiver of all events of this process. Does nothing if the process already has a subscriber.
pub fn install<S: Sink>(sink: &'static S) {
    let _ = tracing::subscriber::set_global_default(Subscriber(sink));
}

struct Subscriber<S: 'static>(&'static S);

impl<S: Sink> tracing::Subscriber for Subscriber<S> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && self.0.enabled(metadata)
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line { sink: self.0, message: String::new(), fields: String::new() };
        event.record(&mut line);
        self.0.write(event.metadata(), &line.message, &line.fields);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// Collects the message and the fields of an event.
struct Line<S: 'static> {
    sink: &'static S,
    message: String,
    fields: String,
}

impl<S: Sink> Line<S> {
    fn add(&mut self, field: &Field, value: Value<'_>) {
        match field.name() {
            "message" => {
                let _ = write!(self.message, "{value}");
            }
            name => self.sink.field(&mut self.fields, name, value),
        }
    }
}

impl<S: Sink> Visit for Line<S> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, Value::Other(value));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, Value::Text(value));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tracing::Level;

    use super::*;
    use crate::sync::lock;

    #[derive(Default)]
    struct Lines(Mutex<Vec<String>>);

    impl Sink for Lines {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            *metadata.level() <= Level::INFO
        }

        fn write(&self, metadata: &'static Metadata<'static>, message: &str, fields: &str) {
            lock(&self.0).push(format!("{} {message}{fields}", metadata.level()));
        }

        fn field(&self, fields: &mut String, name: &str, value: Value<'_>) {
            let _ = write!(fields, " {name}={value:?}|{value}");
        }
    }

    #[test]
    fn events_are_formatted_and_spans_ignored() {
        let sink: &'static Lines = Box::leak(Box::default());
        tracing::subscriber::with_default(Subscriber(sink), || {
            let span = tracing::info_span!("request", id = 1);
            let _guard = span.enter();
            tracing::info!(text = "a b", number = 7, value = ?Some(1), "lines of {}", "text");
            tracing::debug!("not enabled");
            tracing::warn!("no fields");
        });
        let lines = lock(&sink.0).clone();
        let first = r#"INFO lines of text text="a b"|a b number=7|7 value=Some(1)|Some(1)"#;
        assert_eq!(lines, [first, "WARN no fields"]);
    }
}
