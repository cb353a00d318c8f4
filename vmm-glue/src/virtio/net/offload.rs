//! Requests the open files of vhost-net from the shim, and stores the files until vhost-net starts.
//!
//! The VMM cannot open `/dev/vhost-net` itself, because the VMM's jail does not contain this device.

use std::fs::File;

/// A closure that requests open files of `/dev/vhost-net`, one for each queue pair. The closure does not wait for the
/// files.
pub type RequestVhost = Box<dyn Fn() + Send>;

/// Error from offering vhost-net to an interface.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    /// The interface has not requested vhost-net, or has already received the files.
    #[error("failed to start vhost-net: the interface does not wait for files of vhost-net")]
    NotRequested,
    /// The number of files is wrong.
    #[error("failed to start vhost-net: {files} files were sent for {pairs} queue pairs")]
    Count {
        /// Number of files.
        files: usize,
        /// Number of queue pairs.
        pairs: usize,
    },
}

/// The progress of an interface's request for vhost-net. An interface requests vhost-net at most once. If no files
/// arrive, the device loop continues to move the frames.
pub enum Offload {
    /// The device loop always moves the frames, because vhost-net must not move them or has failed to start.
    Never,
    /// vhost-net may be requested.
    Possible(RequestVhost),
    /// vhost-net was requested.
    Requested,
    /// The files have arrived, one for each queue pair.
    Received(Vec<File>),
    /// Each queue pair has an open file of vhost-net.
    Ready,
}

impl Offload {
    /// Requests vhost-net if the state is [`Offload::Possible`]. Otherwise, does nothing.
    pub fn request(&mut self) {
        if let Self::Possible(request) = self {
            request();
            *self = Self::Requested;
        }
    }

    /// Stores the files that were requested.
    ///
    /// # Errors
    /// [`OfferError`]. After an error, the state is unchanged.
    pub fn offer(&mut self, files: Vec<File>, pairs: usize) -> Result<(), OfferError> {
        if !matches!(self, Self::Requested) {
            return Err(OfferError::NotRequested);
        }
        if files.len() != pairs {
            return Err(OfferError::Count { files: files.len(), pairs });
        }
        *self = Self::Received(files);
        Ok(())
    }
}
