//! Limits for the configuration of the pod's network, and its division into messages.

use protobuf::Message;

use crate::agent::UpdateNetworkRequest;

/// Maximum number of addresses, routes, neighbours and rules of a pod together. The agent keeps them in the guest's
/// memory, and adds each with a request to the kernel.
pub const MAX_OBJECTS: usize = 100_000;
/// Maximum size of a part in bytes. ttrpc allows messages of 4 MiB.
const MAX_PART: u64 = 2 << 20;

/// Divides a configuration into messages. The order of the routes, rules and neighbours stays the same.
pub fn parts(config: &UpdateNetworkRequest) -> Vec<UpdateNetworkRequest> {
    let mut parts = Parts::default();
    let UpdateNetworkRequest { interfaces, routes, neighbours, rules, .. } = config;
    interfaces.iter().for_each(|interface| parts.add(interface, |part| &mut part.interfaces));
    routes.iter().for_each(|route| parts.add(route, |part| &mut part.routes));
    neighbours.iter().for_each(|neighbour| parts.add(neighbour, |part| &mut part.neighbours));
    rules.iter().for_each(|rule| parts.add(rule, |part| &mut part.rules));
    parts.complete.push(parts.current);
    let last = parts.complete.len() - 1;
    for (number, part) in parts.complete.iter_mut().enumerate() {
        part.part = u32::try_from(number).unwrap_or(u32::MAX);
        part.more = number < last;
    }
    parts.complete
}

#[derive(Default)]
struct Parts {
    complete: Vec<UpdateNetworkRequest>,
    current: UpdateNetworkRequest,
    /// The encoded size of `current`.
    size: u64,
}

impl Parts {
    fn add<T: Message + Clone>(&mut self, object: &T, list: fn(&mut UpdateNetworkRequest) -> &mut Vec<T>) {
        // The tag and the length of an element take at most 6 bytes.
        let size = object.compute_size() + 6;
        if self.size + size > MAX_PART {
            self.complete.push(std::mem::take(&mut self.current));
            self.size = 0;
        }
        self.size += size;
        list(&mut self.current).push(object.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::{Route, Rule};

    #[test]
    fn parts_fit_in_messages_and_keep_the_order() {
        let route = |number: u32| Route {
            destination: format!("10.{}.{}.{}/32", number >> 16, number >> 8 & 255, number & 255),
            gateway: "10.0.0.1".to_owned(),
            source: "10.0.0.2".to_owned(),
            interface: "eth0".to_owned(),
            metric: number,
            ..Default::default()
        };
        let routes: Vec<_> = (0..90_000).map(route).collect();
        let config = UpdateNetworkRequest { routes, rules: vec![Rule::new(); 3], ..Default::default() };
        assert!(config.compute_size() > 4 << 20);
        let parts = parts(&config);
        assert!(parts.len() > 2 && parts.iter().all(|part| part.compute_size() <= MAX_PART + 16));
        assert!(parts.iter().enumerate().all(|(number, part)| part.part as usize == number));
        assert_eq!(parts.iter().filter(|part| !part.more).count(), 1);
        let joined: Vec<_> = parts.iter().flat_map(|part| &part.routes).map(|route| route.metric).collect();
        assert!(joined == (0..90_000).collect::<Vec<_>>());
        assert_eq!(parts.last().unwrap().rules.len(), 3);
    }

    #[test]
    fn empty_configuration_is_one_part() {
        assert_eq!(parts(&UpdateNetworkRequest::new()), [UpdateNetworkRequest::new()]);
    }
}
