//! Queues events for containerd, and delivers the events in order, with retries.

mod publish;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use husk_base::sync::lock;
use husk_proto::containerd::shim::event::Envelope;
use husk_proto::containerd::topics::TASK_EXIT_EVENT_TOPIC;
use protobuf::MessageFull;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{Notify, watch};

pub use publish::{Destination, PublishError};

/// Maximum number of queued events. This maximum limits the shim's memory use while containerd is down.
const MAX_QUEUED: usize = 4096;

/// Delivers events to containerd. Tests implement this trait without containerd.
#[async_trait::async_trait]
pub trait Publish: Send {
    /// Makes one attempt to deliver the event.
    async fn publish(&mut self, event: &Envelope) -> Result<(), PublishError>;
}

/// The sending end of the event queue.
#[derive(Clone)]
pub struct Events {
    namespace: Arc<str>,
    queue: Arc<Queue>,
}

/// Events that wait for their delivery, in order.
#[derive(Default)]
struct Queue {
    events: Mutex<VecDeque<Box<Envelope>>>,
    added: Notify,
    /// The number of events that are queued or in delivery.
    waiting: watch::Sender<usize>,
}

/// Timeout and backoff for the delivery of one event.
#[derive(Debug, Clone, Copy)]
pub struct RetryPolicy {
    /// How long the shim retries an event that containerd refuses. If containerd does not answer, retries have no
    /// limit.
    pub timeout: Duration,
    /// Delay before the first retry. The delay doubles with each retry, up to two seconds.
    pub initial_backoff: Duration,
}

/// How long the delivery of an event is retried while other events are delivered.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(30);

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { timeout: DELIVERY_TIMEOUT, initial_backoff: Duration::from_millis(20) }
    }
}

impl Events {
    /// Starts delivery on the current async runtime.
    pub fn start(namespace: &str, publisher: impl Publish + 'static, retry: RetryPolicy) -> Self {
        let queue = Arc::<Queue>::default();
        tokio::spawn(deliver(Arc::clone(&queue), publisher, retry));
        Self { namespace: namespace.into(), queue }
    }

    /// Queues an event. If the queue is full, an event is dropped. Exits are dropped last, because a client that misses
    /// an exit waits for it forever.
    pub fn publish<M: MessageFull>(&self, topic: &str, event: &M) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return tracing::error!(topic, %error, "failed to encode an event"),
        };
        let envelope = Envelope {
            timestamp: Some(timestamp(SystemTime::now())).into(),
            namespace: self.namespace.to_string(),
            topic: topic.to_owned(),
            // containerd's typeurl package expects only the message name, without a prefix such as
            // `type.googleapis.com/`.
            event: Some(Any { type_url: M::descriptor().full_name().to_owned(), value, ..Default::default() }).into(),
            ..Default::default()
        };
        if let Some(dropped) = self.queue.push(envelope) {
            let topic = dropped.topic;
            tracing::error!(topic, "dropped an event, because the queue of events for containerd is full");
        }
    }

    /// Waits until all queued events have been delivered or dropped, but at most `timeout`.
    pub async fn flush(&self, timeout: Duration) {
        let mut waiting = self.queue.waiting.subscribe();
        if tokio::time::timeout(timeout, waiting.wait_for(|waiting| *waiting == 0)).await.is_err() {
            let waiting = *self.queue.waiting.borrow();
            tracing::warn!(waiting, "timed out while delivering the last events to containerd");
        }
    }
}

impl Queue {
    /// Adds an event. If the queue is full, removes the oldest event, and returns it. Removes an exit only if the queue
    /// has nothing else.
    fn push(&self, event: Envelope) -> Option<Box<Envelope>> {
        let mut events = lock(&self.events);
        events.push_back(Box::new(event));
        let dropped = if events.len() > MAX_QUEUED {
            let oldest = events.iter().position(|event| event.topic != TASK_EXIT_EVENT_TOPIC);
            events.remove(oldest.unwrap_or(0))
        } else {
            self.waiting.send_modify(|waiting| *waiting += 1);
            None
        };
        drop(events);
        self.added.notify_one();
        dropped
    }

    async fn pop(&self) -> Box<Envelope> {
        loop {
            let added = self.added.notified();
            if let Some(event) = lock(&self.events).pop_front() {
                return event;
            }
            added.await;
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
async fn deliver(queue: Arc<Queue>, mut publisher: impl Publish, retry: RetryPolicy) {
    loop {
        let event = queue.pop().await;
        let deadline = tokio::time::Instant::now() + retry.timeout;
        let mut backoff = retry.initial_backoff;
        let mut is_reported = false;
        while let Err(error) = publisher.publish(&event).await {
            let (topic, is_late) = (&event.topic, tokio::time::Instant::now() + backoff > deadline);
            if is_late && error.is_refusal() {
                let error = crate::chain(&error);
                tracing::error!(topic, error, "dropped an event, because it cannot be delivered");
                break;
            }
            if is_late && !std::mem::replace(&mut is_reported, true) {
                let error = crate::chain(&error);
                tracing::warn!(
                    topic,
                    error,
                    "failed to deliver an event for 30 s; events wait until containerd answers"
                );
            }
            tracing::debug!(topic, error = %crate::chain(&error), "failed to deliver an event; retrying");
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(Duration::from_secs(2));
        }
        queue.waiting.send_modify(|waiting| *waiting -= 1);
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
    use husk_proto::containerd::events::task::{TaskExit, TaskStart};

    use super::*;

    /// Fails some attempts, and then delivers events to a list.
    struct Flaky {
        fails: usize,
        error: fn() -> PublishError,
        delivered: Arc<Mutex<Vec<String>>>,
    }

    #[async_trait::async_trait]
    impl Publish for Flaky {
        async fn publish(&mut self, event: &Envelope) -> Result<(), PublishError> {
            if self.fails > 0 {
                self.fails -= 1;
                return Err((self.error)());
            }
            lock(&self.delivered).push(format!("{} {}", event.topic, event.event.type_url));
            Ok(())
        }
    }

    const START: &str = "/tasks/start containerd.events.TaskStart";
    const EXIT: &str = "/tasks/exit containerd.events.TaskExit";

    /// Returns a queue whose first `fails` deliveries fail with `error`, and the list of delivered events.
    fn flaky(fails: usize, error: fn() -> PublishError) -> (Events, Arc<Mutex<Vec<String>>>) {
        let delivered = Arc::<Mutex<Vec<String>>>::default();
        let publisher = Flaky { fails, error, delivered: Arc::clone(&delivered) };
        (Events::start("default", publisher, RetryPolicy::default()), delivered)
    }

    #[tokio::test(start_paused = true)]
    async fn events_wait_in_order_while_containerd_does_not_answer() {
        for fails in [3, 1000] {
            let (events, delivered) = flaky(fails, || PublishError::Timeout);
            events.publish("/tasks/start", &TaskStart::new());
            events.publish(TASK_EXIT_EVENT_TOPIC, &TaskExit::new());
            events.flush(Duration::from_secs(3600)).await;
            assert_eq!(*lock(&delivered), [START, EXIT]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn invalid_event_takes_no_place_in_the_queue() {
        let (events, delivered) = flaky(0, || PublishError::Timeout);
        // This message cannot be encoded, because its required fields are missing.
        let invalid = protobuf::descriptor::uninterpreted_option::NamePart::new();
        events.publish("/invalid", &invalid);
        assert_eq!(*events.queue.waiting.borrow(), 0);
        events.publish(TASK_EXIT_EVENT_TOPIC, &TaskExit::new());
        events.flush(Duration::from_secs(60)).await;
        assert_eq!(*lock(&delivered), [EXIT]);
    }

    /// The events are published before the runtime delivers the first one.
    #[tokio::test(start_paused = true)]
    async fn number_of_queued_events_is_bounded_and_exits_are_dropped_last() {
        let (events, delivered) = flaky(0, || PublishError::Timeout);
        for _ in 0..100 {
            events.publish("/tasks/start", &TaskStart::new());
        }
        for _ in 0..MAX_QUEUED - 1 {
            events.publish(TASK_EXIT_EVENT_TOPIC, &TaskExit::new());
        }
        assert_eq!(*events.queue.waiting.borrow(), MAX_QUEUED);
        events.flush(Duration::from_secs(60)).await;
        let mut delivered = lock(&delivered);
        assert_eq!((delivered.len(), delivered.remove(0).as_str()), (MAX_QUEUED, START));
        assert!(delivered.iter().all(|event| event == EXIT));
    }

    #[tokio::test(start_paused = true)]
    async fn delivery_continues_after_an_event_that_containerd_refuses() {
        // An event is retried for 30 s, with delays of 20 ms to 2 s.
        let (events, delivered) = flaky(21, || PublishError::NoDestination);
        events.publish("/tasks/start", &TaskStart::new());
        events.publish(TASK_EXIT_EVENT_TOPIC, &TaskExit::new());
        events.flush(Duration::from_secs(60)).await;
        assert_eq!(*lock(&delivered), [EXIT]);
    }
}
