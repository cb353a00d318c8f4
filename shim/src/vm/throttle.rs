//! Limits the rate of input from the agent and the VMM.
//!
//! The shim reads and decodes each message of the agent and the VMM. Without this limit, an agent or a VMM that sends
//! messages without a pause could keep a CPU of the node busy.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// Bytes per second. The shim handles the smallest messages much faster than they arrive at this rate. The messages of
/// an agent or a VMM that is not hostile have a few KiB per second.
const RATE: u64 = 1 << 20;
/// Bytes that can be read at once after a pause. A message has at most 4 MiB.
const BURST: i64 = 4 << 20;
/// Delay before the next read after the burst.
const PAUSE: Duration = Duration::from_millis(20);

/// The number of bytes that can be read now (a token bucket).
pub struct Budget {
    /// Negative after a read that exceeded the limit. The next read then waits longer.
    available: i64,
    /// Time up to which `available` includes the bytes that the rate allows.
    counted: Instant,
}

impl Budget {
    /// Creates a budget of one burst.
    pub fn new() -> Self {
        Self { available: BURST, counted: Instant::now() }
    }

    /// Waits until at least one byte can be read.
    pub async fn wait(&mut self) {
        while !self.is_left() {
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Counts bytes that were read. They may exceed the limit once.
    pub fn take(&mut self, bytes: usize) {
        self.available = self.available.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Returns whether at least one byte can be read now.
    fn is_left(&mut self) -> bool {
        let now = Instant::now();
        let elapsed = u64::try_from((now - self.counted).as_micros()).unwrap_or(u64::MAX);
        let bytes = i64::try_from(elapsed.saturating_mul(RATE) / 1_000_000).unwrap_or(i64::MAX);
        if bytes > 0 {
            self.available = self.available.saturating_add(bytes).min(BURST);
            self.counted = now;
        }
        self.available > 0
    }
}

/// A stream whose reads are limited. A read may exceed the limit once. The next read then waits longer.
pub struct Throttled<S> {
    stream: S,
    budget: Budget,
    pause: Option<Pin<Box<Sleep>>>,
}

impl<S> Throttled<S> {
    /// Limits the reads of `stream`.
    pub fn new(stream: S) -> Self {
        Self { stream, budget: Budget::new(), pause: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Throttled<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if let Some(pause) = &mut this.pause {
                ready!(pause.as_mut().poll(cx));
                this.pause = None;
            }
            if this.budget.is_left() {
                break;
            }
            this.pause = Some(Box::pin(sleep_until(Instant::now() + PAUSE)));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        this.budget.take(buf.filled().len().saturating_sub(before));
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, duplex, repeat};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn reads_get_the_burst_at_once_and_then_the_rate() {
        let mut stream = Throttled::new(repeat(7));
        let start = Instant::now();
        let mut bytes = vec![0; 1 << 20];
        for _ in 0..4 {
            stream.read_exact(&mut bytes).await.unwrap();
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        for _ in 0..5 {
            stream.read_exact(&mut bytes).await.unwrap();
        }
        let elapsed = start.elapsed();
        assert!(
            (Duration::from_millis(3900)..=Duration::from_millis(5100)).contains(&elapsed),
            "reading 5 MiB took {elapsed:?}"
        );
        // After a long pause, the stream again allows only the burst at once.
        tokio::time::sleep(Duration::from_secs(100)).await;
        let start = Instant::now();
        for _ in 0..4 {
            stream.read_exact(&mut bytes).await.unwrap();
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        stream.read_exact(&mut bytes).await.unwrap();
        stream.read_exact(&mut bytes).await.unwrap();
        assert!(start.elapsed() >= Duration::from_millis(900), "reading 2 MiB took only {:?}", start.elapsed());
    }

    #[tokio::test]
    async fn read_reports_the_end_of_the_stream() {
        let (near, far) = duplex(64);
        let mut stream = Throttled::new(near);
        drop(far);
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
    }
}
