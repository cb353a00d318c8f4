//! The way from the device loop to vhost-net: requests the open files of vhost-net from the shim, and keeps them.
//!
//! The VMM cannot open `/dev/vhost-net` itself, because the device is not in its jail.

use std::fs::File;

/// Requests open files of `/dev/vhost-net`, one for each queue pair. Does not wait for them.
pub type RequestVhost = Box<dyn Fn() + Send>;

/// Error from offering vhost-net to an interface.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    /// The interface did not request vhost-net, or already has it.
    #[error("failed to start vhost-net: the interface does not wait for it")]
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

/// How far an interface is on its way to vhost-net. An interface requests vhost-net at most once. Without an answer,
/// the device loop moves the frames for good.
pub enum Offload {
    /// The device loop must move the frames, or vhost-net has failed to start.
    Never,
    /// vhost-net may be requested.
    Possible(RequestVhost),
    /// vhost-net was requested.
    Requested,
    /// The files have arrived, one for each queue pair.
    Received(Vec<File>),
    /// Each queue pair has its file.
    Ready,
}

impl Offload {
    /// Requests vhost-net, if that is possible and was not done before.
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
