//! Queues events for containerd, and delivers the events in order, with retries.

mod publish;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use husk_proto::containerd::shim::event::Envelope;
use protobuf::MessageFull;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{mpsc, oneshot};

pub use publish::{Destination, PublishError};

/// Maximum number of queued events. This maximum limits the shim's memory use while containerd is down.
const MAX_QUEUED: usize = 4096;

/// Delivers events to containerd. Tests implement this trait without containerd.
#[async_trait::async_trait]
pub trait Publish: Send {
    /// Makes one attempt to deliver the event.
    async fn publish(&mut self, event: &Envelope) -> Result<(), PublishError>;
}

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// The sending end of the event queue.
#[derive(Clone)]
pub struct Events {
    namespace: Arc<str>,
    queue: mpsc::UnboundedSender<Item>,
    waiting: Arc<AtomicUsize>,
}

/// Timeout and backoff for the delivery of one event.
#[derive(Debug, Clone, Copy)]
pub struct RetryPolicy {
    /// Timeout for the delivery of an event. If the next retry would start after this timeout, the event is dropped.
    pub timeout: Duration,
    /// Delay before the first retry. The delay doubles with each retry, up to two seconds.
    pub initial_backoff: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(30), initial_backoff: Duration::from_millis(20) }
    }
}

impl Events {
    /// Starts delivery on the current async runtime.
    pub fn start(namespace: &str, publisher: impl Publish + 'static, retry: RetryPolicy) -> Self {
        let (queue, items) = mpsc::unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        tokio::spawn(deliver(items, Arc::clone(&waiting), publisher, retry));
        Self { namespace: namespace.into(), queue, waiting }
    }

    /// Queues an event. If the queue is full, drops the event.
    pub fn publish<M: MessageFull>(&self, topic: &str, event: &M) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return tracing::error!(topic, %error, "failed to encode an event"),
        };
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= MAX_QUEUED {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            tracing::error!(topic, "dropped an event, because the queue of events for containerd is full");
            return;
        }
        let envelope = Envelope {
            timestamp: Some(timestamp(SystemTime::now())).into(),
            namespace: self.namespace.to_string(),
            topic: topic.to_owned(),
            // containerd's typeurl package expects only the message name, without a prefix such as
            // `type.googleapis.com/`.
            event: Some(Any { type_url: M::descriptor().full_name().to_owned(), value, ..Default::default() }).into(),
            ..Default::default()
        };
        let _ = self.queue.send(Item::Event(Box::new(envelope)));
    }

    /// Waits until all queued events have been delivered or dropped, but at most `timeout`.
    pub async fn flush(&self, timeout: Duration) {
        let (done, wait) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).is_ok() && tokio::time::timeout(timeout, wait).await.is_err() {
            tracing::warn!(
                waiting = self.waiting.load(Ordering::Relaxed),
                "timed out while delivering the last events to containerd"
            );
        }
    }
}

/// Delivers the queued events in order. While the delivery of an event is retried, later events wait.
///
/// containerd may receive an event twice. If containerd reads an event, but hangs or dies before it responds, the shim
/// sends the event a second time.
///
/// The shim retries nevertheless, because the kubelet and containerd's CRI wait for exit events. A second exit event of
/// a container is harmless, because the kubelet and containerd's CRI ignore it. containerd's event service cannot drop
/// duplicates, because the `Forward` request has no event id.
async fn deliver(
    mut items: mpsc::UnboundedReceiver<Item>,
    waiting: Arc<AtomicUsize>,
    mut publisher: impl Publish,
    retry: RetryPolicy,
) {
    while let Some(item) = items.recv().await {
        let event = match item {
            Item::Event(event) => event,
            Item::Flush(done) => {
                let _ = done.send(());
                continue;
            }
        };
        let deadline = tokio::time::Instant::now() + retry.timeout;
        let mut backoff = retry.initial_backoff;
        while let Err(error) = publisher.publish(&event).await {
            if tokio::time::Instant::now() + backoff > deadline {
                tracing::error!(
                    topic = event.topic,
                    error = %crate::chain(&error),
                    "dropped an event, because all attempts to deliver it failed"
                );
                break;
            }
            tracing::debug!(topic = event.topic, error = %crate::chain(&error), "failed to deliver an event; retrying");
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(Duration::from_secs(2));
        }
        waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Converts a time to a protobuf timestamp.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use husk_proto::containerd::events::task::{TaskExit, TaskStart};

    use super::*;

    struct Flaky {
        fails: usize,
        delivered: Arc<Mutex<Vec<String>>>,
    }

    #[async_trait::async_trait]
    impl Publish for Flaky {
        async fn publish(&mut self, event: &Envelope) -> Result<(), PublishError> {
            if self.fails > 0 {
                self.fails -= 1;
                return Err(PublishError::NoDestination);
            }
            self.delivered.lock().unwrap().push(format!("{} {}", event.topic, event.event.type_url));
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn retries_keep_the_order_of_events() {
        let delivered = Arc::new(Mutex::new(Vec::new()));
        let events =
            Events::start("default", Flaky { fails: 3, delivered: Arc::clone(&delivered) }, RetryPolicy::default());
        events.publish("/tasks/start", &TaskStart::new());
        events.publish("/tasks/exit", &TaskExit::new());
        events.flush(Duration::from_secs(60)).await;
        assert_eq!(
            *delivered.lock().unwrap(),
            ["/tasks/start containerd.events.TaskStart", "/tasks/exit containerd.events.TaskExit"]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn invalid_event_takes_no_place_in_the_queue() {
        let delivered = Arc::new(Mutex::new(Vec::new()));
        let events =
            Events::start("default", Flaky { fails: 0, delivered: Arc::clone(&delivered) }, RetryPolicy::default());
        // This message cannot be encoded, because its required fields are missing.
        let invalid = protobuf::descriptor::uninterpreted_option::NamePart::new();
        events.publish("/invalid", &invalid);
        assert_eq!(events.waiting.load(Ordering::Relaxed), 0);
        events.publish("/tasks/exit", &TaskExit::new());
        events.flush(Duration::from_secs(60)).await;
        assert_eq!(*delivered.lock().unwrap(), ["/tasks/exit containerd.events.TaskExit"]);
    }

    /// The events are published before the runtime delivers the first one.
    #[tokio::test(start_paused = true)]
    async fn number_of_queued_events_is_bounded() {
        let delivered = Arc::new(Mutex::new(Vec::new()));
        let events =
            Events::start("default", Flaky { fails: 0, delivered: Arc::clone(&delivered) }, RetryPolicy::default());
        for _ in 0..MAX_QUEUED + 100 {
            events.publish("/tasks/exit", &TaskExit::new());
        }
        events.flush(Duration::from_secs(60)).await;
        assert_eq!(delivered.lock().unwrap().len(), MAX_QUEUED);
    }

    #[tokio::test(start_paused = true)]
    async fn delivery_continues_after_a_dropped_event() {
        let delivered = Arc::new(Mutex::new(Vec::new()));
        let retry = RetryPolicy { timeout: Duration::from_secs(1), initial_backoff: Duration::from_millis(400) };
        let events = Events::start("default", Flaky { fails: 2, delivered: Arc::clone(&delivered) }, retry);
        events.publish("/tasks/start", &TaskStart::new());
        events.publish("/tasks/exit", &TaskExit::new());
        events.flush(Duration::from_secs(60)).await;
        assert_eq!(*delivered.lock().unwrap(), ["/tasks/exit containerd.events.TaskExit"]);
    }
}
