//! Rate limits of a pod's devices, from the configuration and the pod's annotations.

use husk_config::{Config, RateLimit, annotation, rate_limit};
use husk_vmm::config;

use crate::oci::spec::Spec;

/// The limits of a pod's devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Limit of each disk.
    pub disk: config::RateLimit,
    /// Limits of each interface.
    pub net: NetRateLimits,
    /// Limit of the share.
    pub virtio_fs: config::RateLimit,
    /// Limit of each direction of vsock.
    pub vsock: config::RateLimit,
}

/// The limits of an interface.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetRateLimits {
    /// Limit of the frames that the guest receives.
    pub receive: config::RateLimit,
    /// Limit of the frames that the guest transmits.
    pub transmit: config::RateLimit,
}

impl NetRateLimits {
    /// Returns whether at least one direction of the interface is limited.
    pub fn is_limited(&self) -> bool {
        self.receive.is_limited() || self.transmit.is_limited()
    }
}

/// Error from an invalid annotation for a rate limit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("invalid annotation {key}={value:?}: {message}")]
pub struct RateLimitError {
    key: &'static str,
    value: String,
    message: String,
}

/// Returns the limits of a pod. The caller has checked that the configuration allows the pod's annotations.
///
/// # Errors
/// [`RateLimitError`] if an annotation is invalid, or would raise a limit of the configuration.
pub fn rate_limits(spec: &Spec, config: &Config) -> Result<RateLimits, RateLimitError> {
    let limit = |key: &'static str, configured: RateLimit| {
        let limit = match spec.annotations.get(key) {
            Some(value) => configured.lowered_by(value).map_err(|message| RateLimitError {
                key,
                value: value.to_owned(),
                message,
            })?,
            None => configured,
        };
        Ok(config::RateLimit { bytes: limit.bytes().map(rate), operations: limit.ops().map(rate) })
    };
    Ok(RateLimits {
        disk: limit(annotation::DISK_RATE_LIMIT, config.disk_rate_limit)?,
        net: NetRateLimits {
            receive: limit(annotation::NET_RECEIVE_RATE_LIMIT, config.net_receive_rate_limit)?,
            transmit: limit(annotation::NET_TRANSMIT_RATE_LIMIT, config.net_transmit_rate_limit)?,
        },
        virtio_fs: limit(annotation::VIRTIO_FS_RATE_LIMIT, config.virtio_fs_rate_limit)?,
        vsock: limit(annotation::VSOCK_RATE_LIMIT, config.vsock_rate_limit)?,
    })
}

fn rate(rate_limit::Rate { per_second, burst }: rate_limit::Rate) -> config::Rate {
    config::Rate { per_second, burst }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::oci::bundle::tests::bundle;

    fn limited(per_second: u64, burst: u64) -> Option<config::Rate> {
        Some(config::Rate { per_second, burst })
    }

    #[test]
    fn limits_come_from_the_configuration_and_each_annotation_lowers_one_limit() {
        let mut config = Config::default();
        let none = bundle(|_| ()).unwrap().spec;
        assert_eq!(rate_limits(&none, &config), Ok(RateLimits::default()));
        let configured = |ops_per_sec| RateLimit { ops_per_sec, ..RateLimit::default() };
        config.disk_rate_limit = configured(100);
        config.net_receive_rate_limit = configured(200);
        config.net_transmit_rate_limit = configured(300);
        config.virtio_fs_rate_limit = configured(400);
        config.vsock_rate_limit = configured(500);
        let operations = |limits: RateLimits| {
            [limits.disk, limits.net.receive, limits.net.transmit, limits.virtio_fs, limits.vsock]
                .map(|limit| limit.operations.unwrap().per_second)
        };
        assert_eq!(rate_limits(&none, &config).map(operations), Ok([100, 200, 300, 400, 500]));
        for (changed, key) in annotation::ALL.into_iter().filter(|key| key.ends_with("_rate_limit")).enumerate() {
            let spec = bundle(|v| v["annotations"] = json!({ key: "ops_per_sec=10,bytes_per_sec=50" })).unwrap().spec;
            let mut expected = [100, 200, 300, 400, 500];
            expected[changed] = 10;
            assert_eq!(rate_limits(&spec, &config).map(operations), Ok(expected), "{key}");
            let raises = bundle(|v| v["annotations"] = json!({ key: "ops_per_sec=501" })).unwrap().spec;
            let error = rate_limits(&raises, &config).unwrap_err().to_string();
            assert!(error.starts_with(&format!("invalid annotation {key}=\"ops_per_sec=501\": ")), "{error}");
        }
        let spec = bundle(|v| v["annotations"] = json!({ annotation::DISK_RATE_LIMIT: "bytes_per_sec=50" }));
        let limits = rate_limits(&spec.unwrap().spec, &config).unwrap();
        assert_eq!((limits.disk.bytes, limits.disk.operations), (limited(50, 5), limited(100, 10)));
        assert!(limits.net.is_limited() && !NetRateLimits::default().is_limited());
    }
}
