"""A ROS 2 node: images in, depth and labels out, without torch. UNTESTED: ROS was not available where this was written.

pip install -e ".[runtime]"        # in a clone of simomerge
python ros2_node.py --ros-args -p file:=scene.onnx -r image:=/camera/image_raw
"""

from __future__ import annotations

import numpy as np
import rclpy
from rclpy.node import Node
from sensor_msgs.msg import Image

from simomerge.runtime import Scene


class SceneNode(Node):
    """Publishes ``~/depth`` (32FC1, metres) and ``~/labels`` (mono8), if the file has these tasks."""

    def __init__(self) -> None:
        super().__init__("scene")
        file = self.declare_parameter("file", "scene.onnx").value
        self.scene = Scene(file, self.declare_parameter("provider", "cpu").value)
        self.scene.warm_up()
        kinds = {name: about.get("kind", name) for name, about in self.scene.info["tasks"].items()}
        wanted = {"depth": ("depth", "32FC1", np.float32), "segmentation": ("labels", "mono8", np.uint8)}
        self.topics = {
            task: (self.create_publisher(Image, f"~/{wanted[kind][0]}", 1), *wanted[kind][1:])
            for task, kind in kinds.items()
            if kind in wanted
        }
        self.create_subscription(Image, "image", self.predict, 1)

    def predict(self, message: Image) -> None:
        rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
        frame = rows[:, : 3 * message.width].reshape(message.height, message.width, 3)
        frame = frame[..., ::-1] if message.encoding == "bgr8" else frame
        for task, values in self.scene.predict(frame, list(self.topics)).items():
            if task not in self.topics:
                continue
            publisher, encoding, dtype = self.topics[task]
            values = np.ascontiguousarray(values.astype(dtype))
            answer = Image(header=message.header, height=message.height, width=message.width, encoding=encoding)
            answer.step, answer.data = values.strides[0], values.tobytes()
            publisher.publish(answer)


def main() -> None:
    rclpy.init()
    rclpy.spin(SceneNode())


if __name__ == "__main__":
    main()
