//! Joins the parts of a network configuration that does not fit in one message.

use husk_proto::agent::UpdateNetworkRequest;
use husk_proto::network::MAX_OBJECTS;

use super::{NetworkConfig, NetworkError};

/// The parts that have arrived. The default value has no part.
#[derive(Default)]
pub struct Parts {
    config: NetworkConfig,
    next: u32,
}

impl Parts {
    /// Adds a part. Returns the configuration if the part is the last one. Part 0 begins a new configuration, because
    /// the shim may have given up an earlier one.
    ///
    /// # Errors
    /// If an earlier part is missing, or if the configuration is too large. The parts are then dropped.
    pub fn add(&mut self, request: UpdateNetworkRequest) -> Result<Option<NetworkConfig>, NetworkError> {
        let UpdateNetworkRequest { interfaces, routes, neighbours, rules, part, more, .. } = request;
        let mut parts = std::mem::take(self);
        if part == 0 {
            parts = Self::default();
        }
        if part != parts.next {
            return Err(NetworkError::Part(part, parts.next));
        }
        let config = &mut parts.config;
        config.interfaces.extend(interfaces);
        config.routes.extend(routes);
        config.neighbours.extend(neighbours);
        config.rules.extend(rules);
        let addresses: usize = config.interfaces.iter().map(|interface| interface.addresses.len()).sum();
        let objects = addresses + config.routes.len() + config.neighbours.len() + config.rules.len();
        if objects > MAX_OBJECTS {
            return Err(NetworkError::TooLarge(objects));
        }
        if !more {
            return Ok(Some(parts.config));
        }
        parts.next = parts.next.saturating_add(1);
        *self = parts;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use husk_proto::agent::Route;

    use super::*;

    fn part(part: u32, more: bool, routes: usize) -> UpdateNetworkRequest {
        let route = Route { metric: part, ..Default::default() };
        UpdateNetworkRequest { part, more, routes: vec![route; routes], ..Default::default() }
    }

    #[test]
    fn configuration_is_complete_with_its_last_part() {
        let mut parts = Parts::default();
        assert!(parts.add(part(0, true, 9)).unwrap().is_none());
        // The shim has given up the first configuration.
        assert!(parts.add(part(0, true, 1)).unwrap().is_none());
        assert!(parts.add(part(1, true, 2)).unwrap().is_none());
        let config = parts.add(part(2, false, 1)).unwrap().unwrap();
        assert_eq!(config.routes.iter().map(|route| route.metric).collect::<Vec<_>>(), [0, 1, 1, 2]);
        assert_eq!(parts.add(part(0, false, 1)).unwrap().unwrap().routes.len(), 1);
    }

    #[test]
    fn missing_part_and_too_many_objects_are_errors() {
        let mut parts = Parts::default();
        assert!(matches!(parts.add(part(1, false, 1)), Err(NetworkError::Part(1, 0))));
        assert!(parts.add(part(0, true, MAX_OBJECTS)).unwrap().is_none());
        assert!(matches!(parts.add(part(1, true, 1)), Err(NetworkError::TooLarge(_))));
        assert!(matches!(parts.add(part(2, false, 1)), Err(NetworkError::Part(2, 0))));
    }
}
